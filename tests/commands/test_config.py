"""`--config`: options in a file; `--log-level`; and the completion of a shell."""

import os
import subprocess
import sys

import pytest
import yaml
from click.testing import CliRunner
from transformers.utils import logging

from linearize_cli.cli import cli, main
from linearize_cli.commands import convert as command
from linearize_cli.commands.options import as_yaml
from linearize_cli.inputs import parse_yaml

LONG = "/data/" + "a long folder name " * 20 + "x.txt"
OPTIONS = {
    "model": "tiny",
    "method": "lolcats",
    "seq-len": 64,
    "tokens": "5k",
    "data": ["a.txt", "b.txt"],
    "set": {"attention.local.size": 16, "recover.distill.lr": 1e-3, "attention.conv.width": None, "a": LONG},
    "no-train": True,
    "keep-softmax": 2,
    "eval-data": None,
}
MODEL_AND_OPTIONS = [
    "tiny",
    "--method",
    "lolcats",
    "--seq-len",
    "64",
    "--tokens",
    "5k",
    "--keep-softmax",
    "2",
]
MODEL_AND_OPTIONS += ["--data", "a.txt", "--data", "b.txt", "--no-train"]
for value in (
    "attention.local.size=16",
    "recover.distill.lr=0.001",
    "attention.conv.width=null",
    f"a={LONG}",
):
    MODEL_AND_OPTIONS += ["--set", value]


@pytest.fixture
def called(monkeypatch):
    """The arguments with which `convert` runs."""
    found = []
    monkeypatch.setattr(
        "linearize_cli.conversion.convert.convert", lambda *a, terminal, **k: found.append((a, k))
    )
    monkeypatch.setattr(command, "quiet_libraries", lambda: None)
    return found


def run(*arguments):
    with pytest.raises(SystemExit) as end:
        main(["convert", *map(str, arguments)])
    return end.value.code or 0


def test_a_file_stands_for_the_options(called, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(OPTIONS, sort_keys=False))
    assert run("--config", file) == 0 and run(*MODEL_AND_OPTIONS) == 0
    assert called[0] == called[1]


def test_the_command_line_overrides_the_file(called, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(OPTIONS, sort_keys=False))
    run("--config", file, "other", "--method", "retention", "--data", "c.txt")
    (_, options) = called[0]
    assert (options["model"], options["method"], options["data"]) == ("other", "retention", ("c.txt",))
    assert options["seq_len"] == 64


def test_one_value_of_a_repeatable_option_needs_no_list(called, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: tiny\ndata: a.txt\nset: 'a=[1, 2]'\n")
    assert run("--config", file) == 0 and run("tiny", "--data", "a.txt", "--set", "a=[1, 2]") == 0
    assert called[0] == called[1]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a: b", '"a: b"'),
        ("x\ny", '"x\\ny"'),
        ('"q', '"\\"q"'),
        ("true", '"true"'),
        ([1, {"a": "é"}], '[1, {"a": "é"}]'),
    ],
)
def test_a_value_is_written_so_that_it_is_read_again(value, text):
    assert as_yaml(value) == text and parse_yaml(text) == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seq-lenn: 3\nmodel: tiny", "no option seq-lenn"),
        ("seq_len: 3\nmodel: tiny", "Did you mean seq-len"),
        ("method: no\nmodel: tiny", "write the text in quotes"),
        ("data: {a: b}\nmodel: tiny", "data takes one value"),
        ("- 1", "holds no options"),
        ("", "holds no options"),
        ("seq-len: many\nmodel: tiny", "run.yaml: seq-len: 'many' is not a valid integer"),
        ("a: [", "run.yaml"),
        ("config: other.yaml", "no option config"),
        ("seq-len: 64", "Missing argument 'MODEL'"),
        ("seq-len: [1, 2]\nmodel: tiny", "seq-len takes one value"),
        ("no-train: 5\nmodel: tiny", "run.yaml: no-train: "),
    ],
)
def test_a_wrong_file_is_refused(called, tmp_path, capsys, text, words):
    (tmp_path / "run.yaml").write_text(text)
    assert run("--config", tmp_path / "run.yaml") == 2
    assert words in capsys.readouterr().err and not called


def test_a_missing_file_is_refused(tmp_path, capsys):
    assert run("--config", tmp_path / "none.yaml") == 2 and "none.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(("level", "shown"), [(None, logging.ERROR), ("info", logging.INFO)])
def test_the_log_of_other_libraries_is_shown_on_demand(level, shown):
    before = logging.get_verbosity()
    try:
        CliRunner().invoke(cli, [*(["--log-level", level] if level else []), "inspect", "absent"])
        assert logging.get_verbosity() == shown
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()


def test_a_shell_completes_commands_and_options():
    def completed(words):
        environment = {"_LINEARIZE_COMPLETE": "bash_complete", "COMP_WORDS": words}
        environment["COMP_CWORD"] = str(len(words.split()) - 1)
        command = "import sys; sys.argv = ['linearize']; from linearize_cli.cli import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", command], env=os.environ | environment, capture_output=True, text=True
        )
        return done.stdout.split()

    assert completed("linearize con") == ["plain,convert"]
    assert "plain,--seq-len" in completed("linearize convert --se")
