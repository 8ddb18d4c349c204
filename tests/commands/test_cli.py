"""The command line as a user meets it: its output and its exit code.

Most commands run in this process, which has loaded torch and transformers. A few run as a process of their own,
for what only a process shows: what libraries print, tracebacks, and what is imported.
"""

import io
import json
import subprocess
import sys
import time
from collections import namedtuple
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from tiny_checkpoint import save_tokenizer, tiny_model
from transformers.utils import logging

from linearize_cli.cli import cli, main
from linearize_cli.methods.registry import method_names

COMMANDS = {"convert", "eval", "verify", "bench", "push", "generate", "heads", "inspect", "methods", "demo"}


Result = namedtuple("Result", "returncode stdout stderr")


def linearize(*arguments, cwd="."):
    """Run a command in this process, in the folder `cwd`."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patched, redirect_stdout(out), redirect_stderr(err):
        patched.chdir(cwd)
        with pytest.raises(SystemExit) as end:
            main(list(map(str, arguments)))
    return Result(end.value.code or 0, out.getvalue(), err.getvalue())


def process(*arguments, cwd):
    """Run a command as a process of its own, in the folder `cwd`."""
    command = [sys.executable, "-m", "linearize_cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)


@pytest.fixture(scope="module", autouse=True)
def restored_logging():
    """Commands set the verbosity of transformers for the rest of the process: restore it."""
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    model = tiny_model(num_key_value_heads=1, max_position_embeddings=128)
    model.save_pretrained(folder / "tiny")
    save_tokenizer(folder / "tiny")
    made = linearize("convert", "tiny", "--no-train", "--set", "attention.local.size=4", cwd=folder)
    assert made.returncode == 0, made.stderr
    return folder


def test_help_loads_no_torch_and_answers_at_once():
    probe = "import sys; sys.argv = ['linearize', '--help']\nfrom linearize_cli.cli import main\n"
    probe += "try: main()\nexcept SystemExit as e: print(e.code, 'torch' in sys.modules, 'transformers' in sys.modules)"
    started = time.monotonic()
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    took = time.monotonic() - started
    assert result.stdout.strip().splitlines()[-1] == "0 False False"
    assert set(cli.commands) >= COMMANDS and all(name in result.stdout for name in COMMANDS)
    assert took < 5, "even a busy machine answers before this"


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_explains_itself(command):
    result = linearize(command, "--help")
    assert result.returncode == 0
    assert all(option in result.stdout for option in ("--json", "--quiet"))


def test_the_default_output_is_the_model_and_the_method(folder):
    assert (folder / "tiny-augmented" / "linearize.json").exists()


def test_methods_lists_all_and_prints_one(tmp_path):
    listing = linearize("methods", "--json", tmp_path / "methods.json")
    assert listing.returncode == 0
    assert all(name in listing.stdout for name in method_names() if ":" not in name)
    assert [
        recipe["name"] for recipe in json.loads((tmp_path / "methods.json").read_text())
    ] == method_names()
    recipe = linearize("methods", "augmented:flash")
    file = tmp_path / "mine.yaml"
    file.write_text(recipe.stdout)
    assert linearize("methods", file).stdout == recipe.stdout


def test_inspect_shows_layers_and_memory(folder):
    result = linearize("inspect", "tiny", "--json", "inspect.json", cwd=folder)
    assert result.returncode == 0 and "model.layers.1.self_attn" in result.stdout
    report = json.loads((folder / "inspect.json").read_text())
    assert [layer["refusal"] for layer in report["layers"]] == [None, None]
    assert report["memory"][0]["kv_bytes"] == report["kv_bytes_per_token"] * 1000
    assert len({row["state_bytes"] for row in report["memory"]}) == 1


@pytest.mark.parametrize(
    ("options", "again"),
    [((), linearize), (("--temperature", "0.8"), process), (("--speculative", "lookup"), linearize)],
)
def test_generate_prints_text_and_repeats_itself(folder, options, again):
    first = linearize(
        "generate", "tiny-augmented", "a fox", "--max-new", "20", "--json", "g.json", *options, cwd=folder
    )
    second = again("generate", "tiny-augmented", "a fox", "--max-new", "20", *options, cwd=folder)
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout and "fox" in first.stdout
    report = json.loads((folder / "g.json").read_text())
    assert report["text"].strip() == first.stdout.strip() and 0 < len(report["tokens"]) <= 20


def test_verify_writes_its_report(folder):
    result = linearize("verify", "tiny-augmented", "--max-new", "12", "--json", "v.json", cwd=folder)
    assert result.returncode == 0, result.stderr
    report = json.loads((folder / "v.json").read_text())
    assert report["verdict"] in ("EXACT", "NUMERICAL_TIE") and report["verdict"] in result.stdout
    assert json.loads((folder / "tiny-augmented" / "verify.json").read_text()) == report


def test_verify_by_other_drafters_and_trees(folder):
    """A tree and prompts of files, and the artifact as the drafter of its own teacher."""
    (folder / "tree.json").write_text("[[0], [1], [0, 0], [1, 0]]")
    (folder / "prompts.txt").write_text("a fox\nsat\n")
    result = linearize(
        *(
            "verify",
            "tiny-augmented",
            "--target",
            "teacher",
            "--tree",
            "tree.json",
            "--prompts",
            "prompts.txt",
        ),
        *("--max-new", "8", "--json", "t.json"),
        cwd=folder,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads((folder / "t.json").read_text())
    assert report["verdict"] in ("EXACT", "NUMERICAL_TIE") and report["tree"]["nodes"] == 5
    assert report["greedy"]["prompts"] == 2 and "teacher" in report["greedy"]["draft"]
    assert report["speed"]["draft"] in result.stdout and "on this machine" in result.stdout


def test_a_failed_verification_ends_with_1(folder, monkeypatch, tmp_path):
    from linearize_cli.verification import verify as verification

    report = json.loads((folder / "tiny-augmented" / "verify.json").read_text())
    failed = report | {"verdict": "FAIL", "failed": ["padding"]}
    monkeypatch.setattr(verification, "verify", lambda *arguments, **keywords: failed)
    with pytest.raises(SystemExit) as stop:
        main(["verify", str(folder / "tiny-augmented"), "--json", str(tmp_path / "v.json")])
    assert stop.value.code == 1
    assert json.loads((tmp_path / "v.json").read_text())["verdict"] == "FAIL"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["convert", "absent"], ["absent"]),
        (["convert", "tiny"], ["tiny-augmented", "--force"]),
        (["convert", "tiny", "-o", "x", "--method", "augmentet"], ["augmented", "lolcats"]),
        (["convert", "tiny", "-o", "x", "--set", "attention.y=1"], ["attention.y"]),
        (["convert", "tiny", "-o", "x", "--tokens", "some"], ["some", "650k"]),
        (["convert", "tiny", "-o", "no/such/folder", "--no-train"], ["no/such"]),
        (["convert", "tiny", "-o", "x", "--no-train", "--medusa-heads", "3"], ["--medusa-heads"]),
        (["heads", "tiny"], ["linearize convert"]),
        (["heads", "tiny-augmented", "--data", "absent.txt"], ["absent.txt"]),
        (["heads", "tiny-augmented", "--resume", "--force"], ["nothing to resume", "--resume"]),
        (["convert", "tiny", "-o", "x", "--data", "absent.txt"], ["absent.txt"]),
        (["convert", "tiny", "-o", "x", "--no-train", "--colour"], ["--colour"]),
        (["verify", "tiny"], ["linearize convert"]),
        (["eval", "tiny"], ["linearize convert"]),
        (["eval", "tiny-augmented"], ["--data"]),
        (["eval", "tiny-augmented", "--data", "absent.txt"], ["absent.txt"]),
        (["eval", "tiny-augmented", "--context", "some"], ["some", "650k"]),
        (["verify", "tiny-augmented", "--draft", "medusa"], ["Medusa heads"]),
        (["verify", "tiny-augmented", "--draft", "absent"], ["absent"]),
        (["verify", "tiny-augmented", "--target", "teacher", "--draft", "lookup"], ["--draft"]),
        (["verify", "tiny-augmented", "--tree", "absent.json"], ["absent.json", "mc_sim_7b_63"]),
        (["verify", "tiny-augmented", "--prompts", "absent.txt"], ["absent.txt"]),
        (["generate", "tiny", "a"], ["linearize convert"]),
        (["generate", "tiny-augmented", "a", "--speculative", "medusa"], ["Medusa heads"]),
        (["generate", "tiny-augmented", "a", "--tree", "chain"], ["--speculative medusa"]),
        (["generate", "tiny-augmented", "a", "--typical"], ["--speculative"]),
        (["generate", "tiny-augmented", "a", "--temperature", "-1"], ["temperature"]),
        (["generate", "tiny-augmented", "a", "--temperature", "nan"], ["temperature"]),
        (["generate", "tiny-augmented", "a", "--top-p", "0"], ["top-p"]),
        (["generate", "tiny-augmented", "a", "--top-p", "0.9"], ["--top-p needs sampling"]),
        (["generate", "tiny-augmented", "a", "--seed", "99999999999999999999"], ["--seed"]),
        (["generate", "absent", "a"], ["absent"]),
        (["methods", "nothing"], ["nothing", "augmented"]),
        (["inspect", "absent"], ["absent"]),
        (["methods", "--json", "no/such/file.json"], ["no/such/file.json"]),
        (["sing"], ["sing"]),
    ],
)
def test_bad_input_ends_with_2_and_says_what_to_do(arguments, words, folder):
    before = sorted(p.name for p in folder.iterdir())
    result = linearize(*arguments, cwd=folder)
    assert result.returncode == 2, result.stderr
    assert all(word in result.stderr for word in words), result.stderr
    assert "Traceback" not in result.stderr and len(result.stderr.splitlines()) < 12
    assert sorted(p.name for p in folder.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["convert", "tiny"], "--force"),
        (["verify", "tiny-augmented", "--draft", "medusa"], "Medusa heads"),
        (["sing"], "sing"),
    ],
)
def test_a_process_that_fails_prints_its_error_alone(arguments, word, folder):
    result = process(*arguments, cwd=folder)
    assert result.returncode == 2 and word in result.stderr, result.stderr
    assert "Traceback" not in result.stderr and len(result.stderr.splitlines()) < 12


def test_an_internal_error_ends_with_3_and_debug_shows_it(folder, monkeypatch, capsys):
    from linearize_cli.methods import registry as methods

    def broken(*arguments):
        raise RuntimeError("a fault")

    monkeypatch.setattr(methods, "read_recipe", broken)
    for arguments, shown in ((["methods"], False), (["--debug", "methods"], True)):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 3
        error = capsys.readouterr().err
        assert "a fault" in error and ("Traceback" in error) == shown


def test_the_python_api_is_there_whatever_was_imported_first():
    probe = "import linearize_cli.conversion.convert, linearize_cli.verification.verify, linearize_cli as l\n"
    probe += "assert all(map(callable, (l.convert, l.load, l.evaluate, l.verify, l.push)))"
    assert subprocess.run([sys.executable, "-c", probe]).returncode == 0


def test_results_go_to_standard_output_and_progress_does_not(folder):
    result = process("convert", "tiny", "-o", "quiet", "--no-train", "-q", cwd=folder)
    assert result.returncode == 0 and result.stderr == "" and "quiet" in result.stdout
    assert Path(folder / "quiet" / "README.md").exists()
