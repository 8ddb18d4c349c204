"""Files are written whole or not at all, and what cannot be written is refused before any work."""

import json
import os
import threading

import pytest
from fake_artifact import write_artifact

from linearize_cli import files
from linearize_cli.cli import cli, main
from linearize_cli.errors import UserError
from linearize_cli.files import check_writable, replacing, write_json
from linearize_cli.metrics import benchmark, evaluation
from linearize_cli.verification import verify as verification

ARGUMENTS = {"compare": ["a", "b"], "convert": ["absent"], "generate": ["absent", "a"], "inspect": ["absent"]}


@pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(failing, tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    write_json(path, {"a": 1})

    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    if failing == "write":
        monkeypatch.setattr(files.Path, "write_text", full)
    else:
        monkeypatch.setattr(files.os, failing, full)
    with pytest.raises(UserError, match="cannot write .*report.json: No space left"):
        write_json(path, {"a": 2})
    monkeypatch.undo()
    assert json.loads(path.read_text()) == {"a": 1} and os.listdir(tmp_path) == ["report.json"]


def test_an_interruption_leaves_the_old_file(tmp_path):
    path = tmp_path / "report.json"
    write_json(path, {"a": 1})
    with pytest.raises(KeyboardInterrupt), replacing(path) as beside:
        beside.write_text("half")
        raise KeyboardInterrupt
    assert json.loads(path.read_text()) == {"a": 1} and os.listdir(tmp_path) == ["report.json"]


def test_a_link_is_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "report.json", tmp_path / "report.json"
    link.symlink_to(target)
    write_json(link, {"a": 1})
    assert link.is_symlink() and json.loads(target.read_text()) == {"a": 1}


def test_the_check_leaves_a_file_of_the_user(tmp_path):
    (tmp_path / "a.json.partial").write_text("mine")
    check_writable(tmp_path / "a.json")
    assert (tmp_path / "a.json.partial").read_text() == "mine" and os.listdir(tmp_path) == ["a.json.partial"]


def test_a_pipe_is_written_to(tmp_path):
    """/dev/stdout may be a pipe, for example."""
    pipe, found = tmp_path / "pipe", []
    os.mkfifo(pipe)
    check_writable(pipe)
    reader = threading.Thread(target=lambda: found.append(pipe.read_text()), daemon=True)
    reader.start()
    write_json(pipe, {"a": 1})
    reader.join(10)
    assert json.loads(found[0]) == {"a": 1} and pipe.is_fifo()


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_every_commands_result_is_writable_before_the_work(command, tmp_path, capsys):
    """Not a folder, nor in none, nor under a name that is too long; what is there stays as it is."""
    (tmp_path / "file").write_text("text")
    for name in ("", "none/r.json", "file/r.json", "n" * 250):
        with pytest.raises(SystemExit) as ended:
            main([command, *ARGUMENTS.get(command, []), "--json", str(tmp_path / name)])
        error = capsys.readouterr().err
        assert ended.value.code == 2 and f"--json {tmp_path / name}" in error, error
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "text"


@pytest.mark.parametrize(
    ("module", "command", "name"),
    [
        (verification, "verify", "verify.json"),
        (evaluation, "evaluate", "eval.json"),
        (evaluation, "evaluate", "eval-recall.png"),
        (benchmark, "bench", "bench.json"),
        (benchmark, "bench", "bench.png"),
    ],
)
def test_an_artifacts_report_is_writable_before_the_work(module, command, name, tmp_path, monkeypatch):
    artifact = write_artifact(tmp_path / "artifact")
    (artifact / name).mkdir()

    def loaded(*arguments, **keywords):
        raise AssertionError("the artifact was loaded")

    monkeypatch.setattr(module, "load_drafted" if command == "verify" else "load", loaded)
    with pytest.raises(UserError, match=f"{name} is a folder"):
        getattr(module, command)(artifact)
    (artifact / name).rmdir()

    def denied(self, *arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.Path, "touch", denied)
    with pytest.raises(UserError, match="Permission denied"):
        getattr(module, command)(artifact)


def test_a_plot_is_a_png_in_a_folder_before_the_work(tmp_path, monkeypatch):
    artifact = write_artifact(tmp_path / "artifact")
    monkeypatch.setattr(benchmark, "load", None)
    for name, words in (
        ("p.pdf", "is not a PNG file"),
        ("none/p.png", "does not exist"),
        ("n" * 250 + ".png", "too long"),
    ):
        with pytest.raises(UserError, match=words):
            benchmark.bench(artifact, plot=tmp_path / name, write=False)
