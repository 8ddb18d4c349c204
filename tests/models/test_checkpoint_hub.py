"""Models on the Hub, with the real huggingface_hub client against a loopback Hub."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loopback_hub import TOKEN, Fault, LoopbackHub, Repo
from meta_format import meta_shards, tiny_llama, write_byte_tokenizer, write_meta

from linearize_cli.models.meta_llama import load_meta_tokenizer

BAD_TOKEN = "hf_noneNoneNoneNoneNoneNone"

# huggingface_hub reads HF_ENDPOINT when it is imported, hence a process of its own.
LOAD = """
import json, os, sys, traceback
import torch
from linearize_cli.models.load import load_teacher
from linearize_cli.errors import UserError
torch.set_num_threads(1)
if "stalled" in sys.argv:
    from linearize_cli import hub
    hub.TIMEOUT = dict.fromkeys(hub.TIMEOUT, 0.3)
for model, token in json.loads(sys.argv[1]):
    os.environ["HF_TOKEN"] = token
    try:
        loaded, tokenizer = load_teacher(model)
        print(json.dumps({"name": loaded.name_or_path, "ids": tokenizer.encode("hi")}))
    except UserError as error:
        print(json.dumps({"what": error.what, "hint": error.hint}))
        traceback.print_exc()  # as --debug does
"""


def load(
    endpoint: str, cache: Path, *models: tuple[str, str], offline: bool = False, stalled: bool = False
) -> list[dict]:
    """Return the result of load_teacher for each (model, token): name and token ids, or `what` and `hint`."""
    environment = {
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HOME": str(cache),
        "HF_TOKEN_PATH": str(cache / "token"),
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-c", LOAD, json.dumps(models), *["stalled"] * stalled],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr and BAD_TOKEN not in done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def repo(files: dict[str, bytes], **kwargs) -> Repo:
    repo = Repo(**kwargs)
    repo.commit("main", files, "model")
    return repo


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    model = tiny_llama(vocab_size=512)
    meta, hugging_face, pickled = map(tmp_path_factory.mktemp, ("meta", "hf", "pickled"))
    write_meta(meta, meta_shards(model.state_dict(), model.config, 2, 0))
    write_byte_tokenizer(meta)
    model.save_pretrained(hugging_face)
    load_meta_tokenizer(meta).save_pretrained(hugging_face)
    shutil.copytree(hugging_face, pickled, dirs_exist_ok=True)
    (pickled / "model.safetensors").unlink()
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    with LoopbackHub({TOKEN: "alice"}) as hub:
        hub.repos["maker/meta"] = repo(contents(meta) | {"original/params.json": b"{}", "LICENSE": b""})
        others = {
            "pytorch_model.bin": b"",
            "tiny.gguf": b"",
            "consolidated.safetensors": b"",
            "onnx/model.json": b"",
        }
        hub.repos["maker/tiny"] = repo(contents(hugging_face) | others)
        hub.repos["maker/pickled"] = repo(contents(pickled))
        hub.repos["maker/gated"] = repo(contents(meta), gated=True)
        hub.repos["maker/private"] = repo(contents(hugging_face), private=True)
        hub.repos["maker/notes"] = repo({"README.md": b"No model."})
        hub.repos["maker/barred"] = repo(contents(hugging_face))
        hub.faults.append(Fault("HEAD", "maker/barred", 403, times=1000, message=f"barred for {TOKEN}"))
        yield hub


@pytest.fixture(scope="module")
def cache(hub, tmp_path_factory) -> Path:
    """A local cache that holds maker/meta and maker/tiny."""
    cache = tmp_path_factory.mktemp("cache")
    names = "maker/meta", "maker/tiny", "maker/pickled"
    meta, tiny, pickled = load(hub.url, cache, *((name, "") for name in names))
    for model, loaded in {"maker/meta": meta, "maker/tiny": tiny, "maker/pickled": pickled}.items():
        assert loaded == {"name": model, "ids": [256, *b"hi"]}
    return cache


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("meta", {"consolidated.00.pth", "consolidated.01.pth"}),
        ("tiny", {"model.safetensors"}),
        ("pickled", {"pytorch_model.bin"}),
    ],
)
def test_one_format_is_downloaded(cache, name, weights):
    snapshot = next((cache / f"hub/models--maker--{name}/snapshots").iterdir())
    names = {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()}
    small = (
        {"params.json", "tokenizer.model"} if name == "meta" else {"config.json", "generation_config.json"}
    )
    small |= {"tokenizer.json", "tokenizer_config.json"} if name != "meta" else set()
    assert names == weights | small


def test_the_modules_of_sentence_transformers_are_downloaded(hub, tmp_path):
    paths = {"": "Transformer", "1_Pooling": "Pooling", "../2_Dense": "Dense"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in paths.items()]
    added = {"modules.json": json.dumps(modules).encode(), "1_Pooling/config.json": b"{}"}
    hub.repos["maker/sentences"] = repo(hub.repos["maker/tiny"].files() | added)
    (loaded,) = load(hub.url, tmp_path, ("maker/sentences", ""))
    assert loaded["name"] == "maker/sentences"
    snapshot = next((tmp_path / "hub/models--maker--sentences/snapshots").iterdir())
    assert {path.name for path in snapshot.iterdir() if path.is_dir()} == {"1_Pooling"}


def test_refusals(hub, tmp_path):
    said = load(
        hub.url,
        tmp_path,
        ("maker/gated", ""),
        ("maker/gated", TOKEN),
        ("maker/private", ""),
        ("maker/privaet", TOKEN),
        ("maker/notes", ""),
        ("maker/tiny", BAD_TOKEN),
        ("maker/barred", TOKEN),
    )
    gated, gated_signed_in, private, misspelt, no_model, bad_token, barred = said
    assert gated["what"] == gated_signed_in["what"] == "maker/gated is gated"
    assert f"1) accept the licence at {hub.url}/maker/gated; 2) `hf auth login`" in gated["hint"]
    assert "gated-repo read" in gated["hint"] and gated["hint"].endswith("not signed in.")
    assert gated_signed_in["hint"].endswith("signed in as alice.")
    assert "no repository maker/private" in private["what"] and "not signed in" in private["hint"]
    assert "a local folder" in private["hint"]
    assert "maker/privaet" in misspelt["what"] and "Check the spelling" in misspelt["hint"]
    assert "neither config.json nor params.json" in no_model["what"] and "maker/notes" in no_model["what"]
    assert "401" in bad_token["what"] and "the Hub does not know the token" in bad_token["hint"]
    assert "403" in barred["what"] and "barred for hf_..." in barred["what"]
    assert "signed in as alice" in barred["hint"] and "a local folder" in barred["hint"]


def test_without_network(cache):
    """Check that a downloaded model loads without the Hub."""
    meta, tiny, other = load(
        "http://127.0.0.1:9", cache, ("maker/meta", ""), ("maker/tiny", ""), ("maker/other", "")
    )
    assert (meta["name"], tiny["name"]) == ("maker/meta", "maker/tiny")
    assert "maker/other needs the Hub, and http://127.0.0.1:9 cannot be reached" in other["what"]
    assert "Check the network" in other["hint"] and "a local folder" in other["hint"]


def test_offline_mode(cache):
    meta, tiny, other = load(
        "http://127.0.0.1:9", cache, ("maker/meta", ""), ("maker/tiny", ""), ("maker/other", ""), offline=True
    )
    assert (meta["name"], tiny["name"]) == ("maker/meta", "maker/tiny")
    assert "HF_HUB_OFFLINE is set" in other["what"] and "a local folder" in other["hint"]


def test_a_hub_that_does_not_answer(hub, tmp_path):
    fault = Fault("GET", "/api/(models/maker/tiny|whoami)", stalled=True, times=10)
    hub.faults.append(fault)
    (said,) = load(hub.url, tmp_path, ("maker/tiny", TOKEN), stalled=True)
    hub.faults.remove(fault)
    assert f"maker/tiny needs the Hub, and {hub.url} does not answer" in said["what"]


def test_gguf(hub, tmp_path):
    """A GGUF file of a repository loads by its name, or by the repository's if it is the only checkpoint."""
    pytest.importorskip("gguf", reason="GGUF files are read with the extra `gguf`")
    from tiny_gguf import TOKENS, tiny_llama, write_gguf

    file = write_gguf(tmp_path / "tiny.gguf", tiny_llama()).read_bytes()
    hub.repos["maker/gguf"] = repo({"README.md": b"", "Q8/tiny.gguf": file})
    hub.repos["maker/ggufs"] = repo({"one.gguf": file, "two.gguf": b"", "notes.txt": b""})
    names = "maker/gguf", "maker/ggufs:one.gguf"
    cache = tmp_path / "cache"
    *loaded, several, absent, misspelt = load(
        hub.url,
        cache,
        *((name, "") for name in names),
        ("maker/ggufs", ""),
        ("maker/ggufs:three.gguf", ""),
        ("maker/gugf:one.gguf", ""),
    )
    expected = [{"name": name, "ids": [TOKENS.index("h"), TOKENS.index("i")]} for name in names]
    assert loaded == expected
    assert several["what"] == "maker/ggufs holds several GGUF files: one.gguf, two.gguf."
    assert several["hint"] == "Name one of them: maker/ggufs:one.gguf"
    assert absent["what"] == "maker/ggufs has no file three.gguf."
    assert "no repository maker/gugf" in misspelt["what"]
    assert not [path for path in cache.rglob("two.gguf")], "only the named file is downloaded"
    for offline in (False, True):
        again = load("http://127.0.0.1:9", cache, *((name, "") for name in names), offline=offline)
        assert again == expected
