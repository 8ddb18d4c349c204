"""An artifact where `linearize` is not installed: an environment of torch, transformers and safetensors alone."""

import json
import os
import re
import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import encoders
import pytest
import torch
from tiny_checkpoint import save_tokenizer, tiny_model

from linearize_cli import convert, load

NEEDED = ("torch", "transformers", "safetensors")
SCRIPT = """
import importlib.util, json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
assert all(importlib.util.find_spec(name) is None for name in ("linearize_cli", "linearize_kernels", "peft"))
torch.set_num_threads(1)
result, caches = [], []
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    ids = tokenizer("<s>a fox sat", return_tensors="pt", add_special_tokens=False)
    tokens = model.generate(**ids, max_new_tokens=24, min_new_tokens=24, do_sample=False)
    logits, cache = model(tokens).logits, DynamicCache(config=model.config)
    model(tokens[:, :12], past_key_values=cache)
    chain = model.read_tree(cache, tokens[:, 12:20], range(-1, 7)).logits
    assert (chain - logits[:, 12:20]).abs().max() < 1e-4
    for other in caches:
        try:
            model(tokens, past_key_values=other)
        except RuntimeError as e:
            assert "of the cache holds a state" in str(e), e
        else:
            raise AssertionError("a cache of another copy was taken")
    caches.append(cache)
    result.append({"tokens": tokens[0].tolist(), "logits": logits[0].tolist()})
    model.save_pretrained(folder + "-again")
print(json.dumps(result))
"""


def closure(names):
    """The distributions that these need, by what they declare for this platform without extras."""
    found, pending = {}, list(names)
    while pending:
        name = pending.pop()
        try:
            dist = distribution(name)
        except PackageNotFoundError:
            continue
        if dist.metadata["Name"] not in found:
            found[dist.metadata["Name"]] = dist
            pending += [
                re.match(r"[\w.-]+", line)[0] for line in dist.requires or () if "extra ==" not in line
            ]
    return found


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The interpreter of an environment that sees the closure of NEEDED and nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "venv")}))
    for dist in closure(NEEDED).values():
        for top in {Path(file).parts[0] for file in dist.files if not str(file).startswith("..")}:
            source, target = Path(dist.locate_file(top)), site / top
            if source.exists() and not target.exists() and top != "__pycache__":
                target.symlink_to(source)
    return folder / "venv" / "bin" / "python"


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """Two artifacts whose bundled code is two different copies, one of them a hybrid."""
    folder = tmp_path_factory.mktemp("artifacts")
    model = tiny_model(num_key_value_heads=1, max_position_embeddings=128)
    model.save_pretrained(folder / "tiny")
    save_tokenizer(folder / "tiny")
    changes = {"one": {}, "two": {"method": "augmented:flash", "keep_softmax": "at:0"}}
    for name, arguments in changes.items():
        convert(
            str(folder / "tiny"),
            folder / name,
            train=False,
            overrides=("attention.local.size=4",),
            **arguments,
        )
    return [folder / name for name in changes]


def test_it_loads_and_says_the_same_where_nothing_of_ours_is_installed(bare, artifacts, tmp_path):
    """Both artifacts in one process: each runs the code it carries."""
    modules = {"HF_MODULES_CACHE": str(tmp_path)}  # where transformers copies an artifact's code to
    command = [bare, "-I", "-c", SCRIPT, *artifacts]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **modules})
    assert result.returncode == 0, result.stderr[-2000:]
    for folder, there in zip(artifacts, json.loads(result.stdout.splitlines()[-1]), strict=True):
        model, tokenizer = load(folder)
        ids = tokenizer("<s>a fox sat", return_tensors="pt", add_special_tokens=False)
        tokens = model.generate(**ids, max_new_tokens=24, min_new_tokens=24, do_sample=False)
        assert tokens[0].tolist() == there["tokens"]
        torch.testing.assert_close(
            model(tokens).logits[0], torch.tensor(there["logits"]), atol=1e-6, rtol=1e-6
        )
        # What was loaded from an artifact saves as an artifact again.
        again = folder.with_name(folder.name + "-again")
        assert {p.name for p in again.glob("*.py")} == {p.name for p in folder.glob("*.py")}
        assert torch.equal(load_model(again)(tokens).logits, model(tokens).logits)


ENCODERS = """
import importlib.util, json, sys
import torch, transformers
assert all(importlib.util.find_spec(name) is None for name in ("linearize_cli", "linearize_kernels", "peft"))
torch.set_num_threads(1)
result = []
for name, folder in zip(sys.argv[1::2], sys.argv[2::2]):
    model = getattr(transformers, name).from_pretrained(folder, trust_remote_code=True).eval()
    ids = torch.arange(5, 45)[None]
    given = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    result.append(model(input_ids=ids, **given)[0][0].tolist())
print(json.dumps(result))
"""


def test_encoders_load_where_nothing_of_ours_is_installed(bare, tmp_path):
    command, expected = [bare, "-I", "-c", ENCODERS], []
    for family, auto_class in {
        "bert": "AutoModelForMaskedLM",
        "bert-body": "AutoModel",
        "modernbert-classifier": "AutoModelForSequenceClassification",
        "t5": "AutoModelForSeq2SeqLM",
    }.items():
        model, ids = encoders.swapped(family), torch.arange(5, 45)[None]
        given = {"decoder_input_ids": ids} if family == "t5" else {}
        expected.append(model(input_ids=ids, **given)[0][0])
        model.save_pretrained(tmp_path / family)
        command += [auto_class, tmp_path / family]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    for here, there in zip(expected, json.loads(result.stdout.splitlines()[-1]), strict=True):
        torch.testing.assert_close(here, torch.tensor(there), atol=1e-6, rtol=1e-6)


def load_model(folder):
    from transformers import AutoModelForCausalLM

    import linearize_cli.runtime  # noqa: F401

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_the_bundled_code_imports_nothing_but_its_neighbours(artifacts):
    for file in artifacts[0].glob("*.py"):
        text = file.read_text()
        assert "linearize_cli.runtime." not in re.sub(r'"[^"]*"|#.*|""".*?"""', "", text, flags=re.S), (
            file.name
        )
        assert not re.search(r"^\s*(from|import) linearize_", text, re.M), file.name
