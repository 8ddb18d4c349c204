"""push with the real huggingface_hub client against a loopback Hub."""

import filecmp
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from fake_artifact import save_weights, write_artifact, write_json
from huggingface_hub import snapshot_download
from loopback_hub import Fault, LoopbackHub, Repo

TOKEN = "hf_aliceAliceAliceAliceAliceAlice"
READ_TOKEN = "hf_readReadReadReadReadReadReadRea"

# huggingface_hub reads HF_ENDPOINT and HF_HUB_DISABLE_XET when it is imported, hence a process for each push.
PUSH = """
import json, sys, time, traceback
from linearize_cli.artifact import hub
from linearize_cli.artifact.push import push
from linearize_cli.errors import UserError
if "stalled" in sys.argv:
    hub.TIMEOUT, time.sleep = dict.fromkeys(hub.TIMEOUT, 0.3), lambda seconds: None
try:
    print(json.dumps(push(**json.loads(sys.argv[1]))))
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
            "PYTHONPATH": str(Path(__file__).parents[1]),
        }
        done = subprocess.run(
            [sys.executable, "-c", PUSH, json.dumps(options), *["stalled"] * stalled],
            cwd=cwd,
            env=os.environ | hub_environment | (environment or {}),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.stdout, done.stderr
        output = done.stdout + done.stderr
        assert TOKEN not in output and READ_TOKEN not in output
        return Pushed(done.returncode, json.loads(done.stdout), output)

    return run


@pytest.fixture
def artifact(tmp_path):
    return write_artifact(tmp_path / "tiny-augmented")


@pytest.fixture
def full_artifact(artifact):
    """Sharded weights, Medusa heads, an adapter and a plot, among files that are nobody else's business."""
    (artifact / "model.safetensors").unlink()
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for seed, shard in enumerate(shards):
        save_weights(artifact / shard, seed)
    write_json(artifact / "model.safetensors.index.json", {"weight_map": {"a": shards[0], "b": shards[1]}})
    save_weights(artifact / "medusa.safetensors", 2)
    (artifact / "adapter").mkdir()
    save_weights(artifact / "adapter" / "adapter_model.safetensors", 3)
    write_json(artifact / "adapter" / "adapter_config.json", {"peft_type": "LORA"})
    (artifact / "bench.png").write_bytes(b"\x89PNG")
    (artifact / "chat_template.jinja").write_text("{{ messages }}")
    belongs = {path.relative_to(artifact).as_posix() for path in artifact.rglob("*") if path.is_file()}

    for stray in (".env", ".cache/x.json", "__pycache__/m.pyc", "adapter/.token", "adapter/x.partial"):
        (artifact / stray).parent.mkdir(exist_ok=True)
        (artifact / stray).write_text(f"HF_TOKEN={TOKEN}")
    for stray in ("model.safetensors.partial", "log.jsonl", "notes.txt", "optimizer.pt"):
        (artifact / stray).write_text("stray")
    return artifact, belongs


def uploads(hub) -> int:
    return sum(method == "PUT" for method, _ in hub.requests)


def writes(hub) -> list:
    return [request for request in hub.requests if request[0] not in ("GET", "HEAD")]


def test_what_is_pushed_comes_back_bit_equal(push, hub, full_artifact, tmp_path):
    artifact, belongs = full_artifact
    pushed = push(artifact, "alice/tiny", commit_message="first")
    assert pushed.code == 0, pushed.output
    assert pushed.data["url"] == f"{hub.url}/alice/tiny"
    assert {file["path"] for file in pushed.data["files"]} == belongs
    assert pushed.data["bytes"] == sum((artifact / name).stat().st_size for name in belongs)
    assert pushed.data["revision"] == "main" and pushed.data["pull_request"] is None
    assert not pushed.data["dry_run"]

    repo = hub.repos["alice/tiny"]
    assert repo.refs["main"] == pushed.data["commit"] and repo.messages[-1] == "first"
    copy = snapshot_download("alice/tiny", endpoint=hub.url, token=TOKEN, local_dir=tmp_path / "copy")
    assert set(repo.files()) == belongs | {".gitattributes"}
    same, different, failed = filecmp.cmpfiles(artifact, copy, belongs, shallow=False)
    assert set(same) == belongs and different == failed == []


def test_a_second_push_sends_only_what_changed(push, hub, artifact):
    first = push(artifact, "alice/tiny").data
    assert uploads(hub) == 1
    same = push(artifact, "alice/tiny").data
    assert same == first and uploads(hub) == 1 and len(hub.repos["alice/tiny"].messages) == 2

    (artifact / "README.md").write_text("# changed\n")
    changed = push(artifact, "alice/tiny").data
    assert changed["commit"] != first["commit"] and uploads(hub) == 1
    assert hub.repos["alice/tiny"].files()["README.md"] == b"# changed\n"

    save_weights(artifact / "model.safetensors", 1)
    push(artifact, "alice/tiny")
    assert uploads(hub) == 2


def test_weights_of_an_earlier_push_do_not_survive_under_another_name(push, hub, artifact):
    push(artifact, "alice/tiny")
    shard = "model-00001-of-00001.safetensors"
    (artifact / "model.safetensors").rename(artifact / shard)
    write_json(artifact / "model.safetensors.index.json", {"weight_map": {"weight": shard}})
    hub.repos["alice/tiny"].files()["notes.txt"] = b"the owner's own"
    assert push(artifact, "alice/tiny").code == 0
    files = hub.repos["alice/tiny"].files()
    assert "model.safetensors" not in files and shard in files and "notes.txt" in files


def test_pull_request_leaves_main_alone(push, hub, artifact):
    hub.repos["bob/tiny"] = Repo()
    main = hub.repos["bob/tiny"].refs["main"]
    pushed = push(artifact, "bob/tiny", create_pr=True)
    assert pushed.code == 0, pushed.output
    assert pushed.data["pull_request"] == f"{hub.url}/bob/tiny/discussions/1"
    repo = hub.repos["bob/tiny"]
    assert repo.refs["main"] == main and "config.json" in repo.files("refs/pr/1")
    assert ("POST", "/api/repos/create") not in hub.requests


def test_pull_request_on_a_new_repository_creates_it(push, hub, artifact):
    assert push(artifact, "alice/new", create_pr=True).data["pull_request"]
    assert "config.json" not in hub.repos["alice/new"].files()


def test_private_is_private_or_refused(push, hub, artifact):
    assert push(artifact, "alice/secret", private=True).code == 0
    assert hub.repos["alice/secret"].private
    assert push(artifact, "alice/secret", private=True).code == 0

    hub.repos["alice/open"] = Repo()
    refused = push(artifact, "alice/open", private=True)
    assert refused.code == 2 and "public" in refused.data["what"] and "settings" in refused.data["hint"]
    assert len(hub.repos["alice/open"].messages) == 1


def test_revision(push, hub, artifact):
    repo = hub.repos["alice/tiny"] = Repo()
    main = repo.refs["dev"] = repo.refs["main"]
    pushed = push(artifact, "alice/tiny", revision="dev")
    assert pushed.data["url"].endswith("alice/tiny/tree/dev")
    assert repo.refs["main"] == main and "config.json" in repo.files("dev")


def test_repository_is_named_after_the_user_and_the_folder(push, hub, artifact):
    assert push(cwd=artifact).data["repo_id"] == "alice/tiny-augmented"
    assert push(artifact, "other").data["repo_id"] == "alice/other"
    assert set(hub.repos) == {"alice/tiny-augmented", "alice/other"}


def test_dry_run_writes_nothing(push, hub, artifact):
    dry = push(artifact, dry_run=True)
    assert dry.code == 0 and dry.data["repo_id"] == "alice/tiny-augmented" and dry.data["dry_run"]
    assert dry.data["commit"] is None and writes(hub) == [] and hub.repos == {}
    hub.requests.clear()
    signed_out = push(artifact, "bob/any", dry_run=True, environment={"HF_TOKEN": ""})
    assert signed_out.data["files"] == dry.data["files"] and hub.requests == []
    real = push(artifact).data
    assert real["files"] == dry.data["files"] and real["url"] == dry.data["url"]


def test_a_passing_fault_is_retried(push, hub, artifact):
    hub.faults.append(Fault("PUT", "/lfs/", 503))
    assert push(artifact, "alice/tiny").code == 0


STALLS = [
    ("POST", "/repos/create"),
    ("POST", "/validate-yaml"),
    ("POST", "/preupload/"),
    ("POST", "/objects/batch"),
    ("PUT", "/lfs/"),
    ("POST", "/commit/"),
]


@pytest.mark.parametrize("endpoint", [*STALLS, ("GET", "/api/models/")], ids=lambda endpoint: endpoint[1])
def test_a_hub_that_does_not_answer_ends_a_push(push, hub, artifact, endpoint):
    hub.faults.append(Fault(*endpoint, times=100, stalled=True))
    refused = push(artifact, "alice/tiny", stalled=True, private=False)
    assert refused.code == 2 and "timed out" in refused.data["what"] and "again" in refused.data["hint"]
    assert 2 <= sum(request[0] == endpoint[0] and endpoint[1] in request[1] for request in hub.requests) <= 6
    hub.faults.clear()
    assert push(artifact, "alice/tiny").code == 0


@pytest.mark.parametrize("endpoint", STALLS, ids=lambda endpoint: endpoint[1])
def test_a_hub_that_stalls_once_is_asked_again(push, hub, artifact, endpoint):
    hub.faults.append(Fault(*endpoint, stalled=True))
    assert push(artifact, "alice/tiny", stalled=True).code == 0
    assert "model.safetensors" in hub.repos["alice/tiny"].files()


def test_a_commit_whose_reply_was_lost_is_not_made_again(push, hub, artifact):
    hub.faults.append(Fault("POST", "/commit/", lost=True))
    pushed = push(artifact, "alice/tiny", stalled=True)
    assert pushed.code == 0 and pushed.data["commit"] == hub.repos["alice/tiny"].refs["main"]
    assert len(hub.repos["alice/tiny"].messages) == 2


@pytest.mark.parametrize("fault", [{"lost": True}, {"status": 504, "lost": True}], ids=str)
def test_a_pull_request_whose_reply_was_lost_is_not_opened_again(push, hub, artifact, fault):
    repo = hub.repos["bob/tiny"] = Repo()
    assert push(artifact, "bob/tiny", create_pr=True).data["pull_request"].endswith("/1")
    hub.faults.append(Fault("POST", "/commit/", **fault))
    pushed = push(artifact, "bob/tiny", create_pr=True, stalled=True)
    assert pushed.code == 0, pushed.output
    assert pushed.data["pull_request"] == f"{hub.url}/bob/tiny/discussions/2"
    assert pushed.data["commit"] == repo.refs["refs/pr/2"] and len(repo.pull_requests) == 2


def test_a_pull_request_that_may_be_open_is_told(push, hub, artifact):
    repo = hub.repos["bob/tiny"] = Repo()
    hub.faults.append(Fault("POST", "/commit/", times=100, stalled=True))
    refused = push(artifact, "bob/tiny", create_pr=True, stalled=True)
    assert refused.code == 2 and "bob/tiny/discussions first" in refused.data["hint"]
    assert sum("/commit/" in path for _, path in hub.requests) == 1 and not repo.pull_requests


def test_a_repository_that_exists_needs_no_address(push, hub, artifact):
    hub.repos["alice/tiny"] = Repo()
    hub.faults.append(Fault("POST", "/create", 409, body=b'{"error": "You already created this model repo"}'))
    assert push(artifact, "alice/tiny").code == 0


HTML = b"<html>Sign in to the network</html>"


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        *(
            ("POST", path, HTML)
            for path in ("/create", "/validate-yaml", "/preupload/", "/batch", "/commit/")
        ),
        *(("GET", "/whoami", HTML), ("POST", "/create", b"[]"), ("POST", "/preupload/", b"{}")),
        ("POST", "/commit/", b""),
    ],
)
def test_an_answer_that_is_not_the_hubs_is_told(push, hub, artifact, method, path, body):
    hub.faults.append(Fault(method, path, 200, times=100, body=body))
    refused = push(artifact, "tiny" if path == "/whoami" else "alice/tiny")
    assert refused.code == 2 and "again" in refused.data["hint"], refused.output


def wrong(what, hint, environment=None, **options):
    return pytest.param(options, environment, what, hint, id=what)


@pytest.mark.parametrize(
    ("options", "environment", "what", "hint"),
    [
        wrong("not signed in", "hf auth login", {"HF_TOKEN": ""}),
        wrong("does not accept the token", "hf auth login", token="hf_wrongWrongWrongWrong"),
        wrong("the Hub does not accept the token", "HF_TOKEN", {"HF_TOKEN": "hf_wrongWrong"}, repo_id=None),
        wrong("characters that no token has", "settings/tokens", token=f"{TOKEN}\n{TOKEN}"),
        wrong("no permission to write to alice/new", "write access", token=READ_TOKEN),
        wrong("no permission to write to bob/new", "--create-pr", repo_id="bob/new"),
        wrong("no permission to write to bob/open", "--create-pr", repo_id="bob/open"),
        wrong("bob/gated is gated", "Accept its terms at http", repo_id="bob/gated", create_pr=True),
        wrong(
            "alice/old has no revision dev",
            "branch create alice/old dev",
            repo_id="alice/old",
            revision="dev",
        ),
        wrong("no repository alice/new", "creates the repository", revision="dev"),
        wrong("exclude each other", "main", revision="dev", create_pr=True),
        wrong("'a/b/c' cannot name a repository", "NAMESPACE/NAME", repo_id="a/b/c"),
        wrong("the Hub at http://127.0.0.1:9 failed", "network", {"HF_ENDPOINT": "http://127.0.0.1:9"}),
        wrong("offline mode is enabled", "HF_HUB_OFFLINE", {"HF_HUB_OFFLINE": "1"}),
    ],
)
def test_errors_say_what_to_do(push, hub, artifact, options, environment, what, hint):
    hub.repos |= {"alice/old": Repo(), "bob/open": Repo(), "bob/gated": Repo(gated=True)}
    refused = push(environment=environment, **{"artifact": str(artifact), "repo_id": "alice/new"} | options)
    assert refused.code == 2
    assert what in refused.data["what"] and "\n" not in refused.data["what"]
    assert hint in refused.data["hint"]
    assert all(len(repo.commits) == 1 for repo in hub.repos.values()) and "alice/new" not in hub.repos
    assert "hf_wrong" not in refused.output


@pytest.mark.parametrize(
    ("fault", "what", "hint"),
    [
        (Fault("PUT", "/lfs/", 403), "the upload to alice/tiny broke off", "not sent twice"),
        (Fault("POST", "/commit/", 503), "HTTP 503", "busy"),
        (
            Fault("POST", "/validate-yaml", 400, message="base_model is wrong"),
            "base_model is wrong",
            "Correct that",
        ),
    ],
    ids=lambda value: value.path if isinstance(value, Fault) else "",
)
def test_a_push_that_fails_changes_nothing_and_can_be_repeated(push, hub, artifact, fault, what, hint):
    hub.faults.append(fault)
    refused = push(artifact, "alice/tiny")
    assert refused.code == 2 and what in refused.data["what"] and hint in refused.data["hint"]
    assert list(hub.repos["alice/tiny"].files()) == [".gitattributes"]
    assert push(artifact, "alice/tiny").code == 0
    assert "model.safetensors" in hub.repos["alice/tiny"].files()


@pytest.mark.parametrize("token", [TOKEN, "api_org_OfTheOldForm"])
def test_a_token_that_the_hub_repeats_is_not_shown(push, hub, artifact, token):
    hub.tokens[token] = "alice"
    hub.faults.append(Fault("GET", "/tree/", 404, message=f"{token} is not hf_someoneElsesToken"))
    refused = push(artifact, "alice/tiny", token=token)
    assert "hf_... is not hf_..." in refused.data["what"]
    assert token not in refused.output and "hf_someone" not in refused.output
