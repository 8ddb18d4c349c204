"""Fixtures for tests of push: a loopback Hub, an artifact, and push in a process of its own."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from fake_artifact import write_artifact
from loopback_hub import READ_TOKEN, TOKEN, LoopbackHub

# huggingface_hub reads HF_ENDPOINT and HF_HUB_DISABLE_XET when it is imported, hence a process for each push.
PUSH = """
import json, sys, time, traceback
from linearize_cli import hub
from linearize_cli.publish.push import push
from linearize_cli.errors import UserError
if "stalled" in sys.argv:
    hub.TIMEOUT, time.sleep = dict.fromkeys(hub.TIMEOUT, 0.3), lambda seconds: None
try:
    print(json.dumps(push(**{"verify": False, **json.loads(sys.argv[1])})))
except UserError as error:
    print(json.dumps({"what": error.what, "hint": error.hint}))
    traceback.print_exc()  # as --debug does
    sys.exit(error.exit_code)
"""


@dataclass
class Pushed:
    """Exit code, the result or the error's `what` and `hint`, and all that was printed."""

    code: int
    data: dict
    output: str


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with LoopbackHub({TOKEN: "alice", READ_TOKEN: "alice"}, read_only=(READ_TOKEN,)) as hub:
        yield hub


@pytest.fixture
def push(hub, tmp_path):
    """push(artifact, repo_id, ..., environment={}, cwd=None) -> Pushed; signed in as alice by default."""

    def run(*names, environment=None, cwd=None, stalled=False, **options) -> Pushed:
        options |= dict(zip(("artifact", "repo_id"), map(str, names), strict=False))
        hub_environment = {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "hf"),
            "HF_TOKEN": TOKEN,
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        done = subprocess.run(
            [sys.executable, "-c", PUSH, json.dumps(options), *["stalled"] * stalled],
            cwd=cwd,
            env=os.environ | hub_environment | (environment or {}),
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.stdout, done.stderr
        output = done.stdout + done.stderr
        assert TOKEN not in output and READ_TOKEN not in output
        return Pushed(done.returncode, json.loads(done.stdout), output)

    return run


@pytest.fixture
def artifact(tmp_path):
    return write_artifact(tmp_path / "tiny-augmented")
