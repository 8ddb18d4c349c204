"""push with the real huggingface_hub client against a loopback Hub."""

import filecmp

import pytest
from fake_artifact import save_weights, write_json
from huggingface_hub import snapshot_download
from loopback_hub import READ_TOKEN, TOKEN, Fault, Repo

from linearize_cli.artifact.record import read_record, write_record
from linearize_cli.checksums import checksums

pytest_plugins = ["push_case"]


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
        wrong("bob/gated is gated", "accept the licence at http", repo_id="bob/gated", create_pr=True),
        wrong(
            "alice/old has no revision dev",
            "branch create alice/old dev",
            repo_id="alice/old",
            revision="dev",
        ),
        wrong("no repository alice/new", "creates the repository", revision="dev"),
        wrong("exclude each other", "main", revision="dev", create_pr=True),
        wrong("'a/b/c' cannot name a repository", "NAMESPACE/NAME", repo_id="a/b/c"),
        wrong("http://127.0.0.1:9 cannot be reached", "network", {"HF_ENDPOINT": "http://127.0.0.1:9"}),
        wrong("HF_HUB_OFFLINE is set", "Unset it", {"HF_HUB_OFFLINE": "1"}),
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


def test_files_that_changed_since_they_were_saved_are_refused(push, artifact):
    write_record(artifact, {**read_record(artifact), "checksums": checksums(artifact)})
    assert push(artifact, "alice/tiny", dry_run=True).code == 0
    (artifact / "recipe.yaml").write_text("name: another")
    refused = push(artifact, "alice/tiny", dry_run=True)
    assert refused.code == 2 and "changed: recipe.yaml" in refused.data["what"]
