"""`linearize demo` and `linearize convert demo`, with a token budget too small to learn anything."""

import json
import subprocess
import sys

import pytest

from linearize_cli.cli import main
from linearize_cli.conversion import demo as run
from linearize_cli.conversion import pipeline
from linearize_cli.conversion.demo import demo


def test_demo_reports_all_that_its_table_shows(tmp_path):
    report = demo(tmp_path / "out", tokens=8_000)
    assert report["verdict"] in ("EXACT", "NUMERICAL_TIE")
    assert report["recall"]["teacher"] > 0.9 > report["recall"]["student"]
    assert all(value > 1 for value in report["perplexity"].values())
    assert report["state_bytes"] < report["kv_bytes_per_token"] * report["context"]
    assert json.loads((tmp_path / "out" / "verify.json").read_text())["verdict"] == report["verdict"]
    assert json.loads((tmp_path / "out" / "bench.json").read_text()) == report["bench"]
    assert all(row["seconds"] > 0 for row in report["bench"]["rows"])


def test_an_interrupted_demo_can_be_resumed(tmp_path, monkeypatch, capsys):
    """Check that --resume works, as the message of the interruption says."""

    def interrupted(*arguments, **keywords):
        raise KeyboardInterrupt

    arguments = ["demo", "-o", str(tmp_path / "out"), "--tokens", "8k", "-q"]
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as ended:
        patched.setattr(pipeline, "recover", interrupted)
        main(arguments)
    assert ended.value.code == 130 and "continue with --resume" in capsys.readouterr().err
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as ended:
        patched.setattr(run, "evaluate", interrupted)
        main([*arguments, "--resume"])
    assert ended.value.code == 130 and (tmp_path / "out" / "linearize.json").exists()


@pytest.mark.slow
def test_convert_demo_needs_no_data(tmp_path):
    command = [sys.executable, "-m", "linearize_cli", "convert", "demo", "--tokens", "8k", "--seq-len", "256"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "demo-augmented" / "linearize.json").exists()
