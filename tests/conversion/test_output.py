"""The output folder of a conversion: what is refused before any work, and what a kill leaves."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from convert_case import make_teacher, run
from fake_artifact import write_artifact

from linearize_cli import convert
from linearize_cli.artifact.contents import foreign_files
from linearize_cli.checksums import sha256
from linearize_cli.conversion import heads, pipeline
from linearize_cli.errors import UserError

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("output"))


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """Return the message of a conversion into a folder that is refused before the model is loaded; nothing changes."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "text.txt").write_text("a fox sat")

    def loaded(*arguments):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(pipeline, "load_stored", loaded)

    def refused(output, model="model", data="text.txt", force=True, **options) -> str:
        before = contents(tmp_path)
        data = {"data": (str(tmp_path / data),), **options}
        with pytest.raises(UserError) as error:
            convert(str(tmp_path / model), tmp_path / output, force=force, **data)
        assert contents(tmp_path) == before
        assert len(str(error.value)) < 1000
        return str(error.value)

    return refused


def contents(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def test_force_keeps_what_no_artifact_has(refused, tmp_path):
    artifact = write_artifact(tmp_path / "out")
    names = ("a.tex", "b.csv", "notes/c.md", "d.json", "e.safetensors", "f.py", "adapter/linearize.json")
    for name in names:
        (artifact / name).parent.mkdir(exist_ok=True)
        (artifact / name).write_text("years of work")
    message = refused("out")
    assert "a.tex, adapter/linearize.json, b.csv, d.json, e.safetensors and 2 more" in message


def test_a_link_in_an_artifact_is_no_part_of_it(refused, tmp_path):
    artifact = write_artifact(tmp_path / "out")
    (tmp_path / "elsewhere").mkdir()
    (artifact / "runs").symlink_to(tmp_path / "elsewhere")
    assert "runs" in refused("out")


def test_all_that_commands_write_belongs_to_an_artifact(teacher):
    """The files of a conversion with heads and an adapter, and of the measurements; Python's and a killed write's."""
    output = teacher.folder / "everything"
    report = run(teacher, output, keep_adapter=True, medusa_heads=1, tokens=16 * 4 * 5)
    (output / "__pycache__").mkdir()
    for name in (
        *("verify.json", "eval.json", "eval-recall.png", "bench.json", "bench.png", "verify.json.partial"),
        *("__pycache__/modeling_linearized.cpython-311.pyc", "linearize_own_softplus.py"),
    ):
        (output / name).write_text("")
    assert list(foreign_files(output)) == []
    (output / "mine.model").write_text("")
    assert list(foreign_files(output)) == ["mine.model"]
    path = output / "linearize.json"
    path.write_text(json.dumps({"checksums": {"mine.model": "0"}}))
    assert list(foreign_files(output)) == [] and report["output"] == str(output)


def test_force_keeps_the_model_and_the_data(refused, tmp_path):
    artifact = write_artifact(tmp_path / "out")
    (tmp_path / "model").rename(artifact / "teacher")
    (tmp_path / "text.txt").rename(artifact / "text.txt")
    (tmp_path / "link").symlink_to(artifact / "teacher")
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "weights").symlink_to(artifact / "model.safetensors")
    for model in ("out/teacher", "out", "link", "out/../link", "beside"):
        assert "holds files of the model" in refused("out", model), model
    message = refused("out", "absent", "out/text.txt")
    assert "holds data" in message and "text.txt" in message
    assert "is inside the data folder" in refused("out", "absent", "", eval_data=str(artifact / "text.txt"))
    assert "holds data" in refused("out", "absent", "absent", eval_data=str(artifact / "text.txt"))


def test_an_artifact_in_the_models_folder_is_replaced(teacher):
    """Check the folder that `convert .` writes to."""
    model = teacher.folder / "teacher"
    write_artifact(model / "out")
    convert(str(model), model / "out", train=False, force=True)
    assert (model / "out" / "linearize_runtime_cache.py").exists() and (model / "model.safetensors").exists()


def test_force_replaces_an_artifact_alone(refused, tmp_path, monkeypatch):
    model = tmp_path / "only-weights"
    write_artifact(model)
    (model / "linearize.json").unlink()
    assert "is not an artifact" in refused("only-weights")
    (tmp_path / "file").write_text("text")
    assert "is not a folder" in refused("file")
    artifact = write_artifact(tmp_path / "out")
    (artifact / "adapter").mkdir()
    monkeypatch.chdir(artifact / "adapter")
    assert "working directory" in refused("out")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == artifact)
    assert "mount point" in refused("out")


def test_an_edited_card_is_not_replaced(teacher, tmp_path):
    """A card that one has written is not deleted with its artifact; one that nobody touched is."""
    folder = tmp_path / "out"
    convert(str(teacher.folder / "teacher"), folder, train=False)
    convert(str(teacher.folder / "teacher"), folder, train=False, force=True)
    card = folder / "README.md"
    card.write_text(card.read_text() + "my own words")
    with pytest.raises(UserError, match="README.md that was edited"):
        convert(str(teacher.folder / "teacher"), folder, train=False, force=True)
    assert card.read_text().endswith("my own words")


def test_a_place_that_cannot_be_written_is_refused(refused, tmp_path, monkeypatch):
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert "nowhere, which does not exist" in refused("dangling")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "loop" in refused("loop")
    assert "cannot be an artifact's folder" in refused("/")
    assert "name too long" in refused("n" * 250).lower()
    assert "does not exist" in refused("text.txt/out")
    assert "does not exist" in refused("absent/out")
    assert "nosuchuser" in refused_home(tmp_path)

    def denied(path, *arguments, **keywords):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    assert "Permission denied" in refused("out")


def refused_home(tmp_path):
    with pytest.raises(UserError) as error:
        convert(str(tmp_path / "model"), "~nosuchuser/out")
    return str(error.value)


@pytest.mark.parametrize("flags", [{}, {"force": True}, {"resume": True}], ids=str)
def test_a_partial_folder_of_somebody_else_is_left_alone(refused, tmp_path, flags):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "thesis.tex").write_text("years of work")
    assert "thesis.tex" in refused("out", **{"force": False, **flags})
    (partial / "thesis.tex").rename(partial / "job.json")
    assert "job.json" in refused("out", **{"force": False, **flags})
    (partial / "job.json").write_text('{"model": "m", "recipe": {}}')
    (partial / "notes.md").write_text("notes")
    assert "notes.md" in refused("out", **{"force": False, **flags})


def test_two_runs_into_one_folder_are_refused(refused, tmp_path):
    (tmp_path / "out.partial").mkdir()
    descriptor = os.open(tmp_path / "out.partial", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert "another run" in refused("out")
    os.close(descriptor)


def test_the_folder_behind_a_link_is_replaced(teacher):
    real, link = teacher.folder / "real", teacher.folder / "link"
    write_artifact(real)
    link.symlink_to(real)
    run(teacher, link, train=False, force=True)
    assert link.is_symlink() and (real / "linearize_runtime_cache.py").exists()
    assert not list(teacher.folder.glob("*.partial"))


def test_a_folder_that_appears_meanwhile_is_kept(teacher, monkeypatch):
    output, load = teacher.folder / "late", pipeline.load_stored

    def slow(*arguments):
        output.mkdir()
        (output / "thesis.tex").write_text("years of work")
        return load(*arguments)

    monkeypatch.setattr(pipeline, "load_stored", slow)
    with pytest.raises(UserError, match="already exists"):
        run(teacher, output, train=False)
    assert os.listdir(output) == ["thesis.tex"] and not (teacher.folder / "late.partial").exists()


def test_an_interrupted_run_with_force_is_resumed(teacher, monkeypatch):
    output = write_artifact(teacher.folder / "forced")
    before = contents(output)

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt, match="--resume"):
        patched.setattr(pipeline, "save", interrupted)
        run(teacher, output, tokens=16 * 4 * 5, force=True)
    assert contents(output) == before
    with pytest.raises(UserError, match="--resume to continue it, or --force"):
        run(teacher, output, tokens=16 * 4 * 5)
    run(teacher, output, tokens=16 * 4 * 5, resume=True)
    assert (output / "linearize_runtime_cache.py").exists() and not output.with_name(
        "forced.partial"
    ).exists()


def test_an_interruption_before_anything_is_done_leaves_nothing(teacher, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "load_stored", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(teacher, teacher.folder / "early", train=False)
    assert not list(teacher.folder.glob("early*"))


def test_an_artifact_that_cannot_be_moved_is_put_back(teacher, monkeypatch):
    """Without an exchange in one step, and with a second rename that fails."""
    from linearize_cli.conversion import output as module

    output = write_artifact(teacher.folder / "stuck")
    before, rename = contents(output), os.rename

    def stuck(source, target):
        if Path(source).name == "artifact":
            raise OSError(16, "Device or resource busy")
        rename(source, target)

    monkeypatch.setattr(module, "exchange", lambda *folders: False)
    monkeypatch.setattr(os, "rename", stuck)
    with pytest.raises(UserError, match="cannot replace .*stuck: Device or resource busy"):
        run(teacher, output, train=False, force=True)
    assert contents(output) == before


def test_an_interrupted_report_of_heads_is_completed(teacher, monkeypatch):
    output, facts = teacher.folder / "told", {"heads": 1, "tree_nodes": 2, "expected_tokens_per_step": 1.5}
    run(teacher, output, train=False)
    (output / heads.FILE).write_text("heads")
    report, write = json.loads((output / "linearize.json").read_text()), heads.write_record

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(heads, "write_record", interrupted)
    with pytest.raises(KeyboardInterrupt):
        heads.record_heads(output, report, facts)
    monkeypatch.setattr(heads, "write_record", write)
    heads.record_heads(output, json.loads((output / "linearize.json").read_text()), facts)
    assert "1.50 expected tokens" in (output / "README.md").read_text()
    told = json.loads((output / "linearize.json").read_text())
    assert told["medusa"] == facts and told["card"] == sha256(output / "README.md")
    assert told["checksums"][heads.FILE] == sha256(output / heads.FILE)


def test_heads_of_an_artifact_that_was_replaced_are_not_resumed(teacher, monkeypatch):
    output = teacher.folder / "other"
    run(teacher, output, train=False)

    def interrupted(job, partial, *arguments):
        (partial / "checkpoint.pt").write_text("trained")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt, match="--resume"):
        patched.setattr(heads, "train", interrupted)
        heads.heads(output)
    run(teacher, output, train=False, keep_softmax="at:1", force=True)
    with pytest.raises(UserError, match="belongs to a run with different values of artifact"):
        heads.heads(output, resume=True)


def kill(folder, *moments):
    command = [sys.executable, SUPPORT / "output_case.py", folder, *map(str, moments)]
    environment = {**os.environ, "PYTHONPATH": str(SUPPORT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_kill_at_any_file_operation_leaves_a_whole_artifact(tmp_path):
    kill(tmp_path)


# Of a real conversion: in training, before and after the artifacts are exchanged, and while the old one is deleted.
@pytest.mark.parametrize(
    "moments", [(3, 15, 16, 40), pytest.param(range(1, 200), marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_a_killed_conversion_leaves_a_whole_artifact(moments, tmp_path):
    kill(tmp_path, *moments)
