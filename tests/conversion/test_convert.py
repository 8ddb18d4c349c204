"""The pipeline on a tiny checkpoint: what it writes, and how it refuses."""

import json
import math
import shutil
import statistics

import pytest
from convert_case import METHODS, SMALL, losses, make_teacher, run

from linearize_cli import convert, load
from linearize_cli.conversion.workspace import Workspace
from linearize_cli.data import sources as data
from linearize_cli.errors import CheckFailed, UserError
from linearize_cli.methods.registry import load_recipe, method_names
from linearize_cli.metrics.perplexity import perplexity
from linearize_cli.verification import verify as verification
from linearize_cli.verification.verify import verify_model


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("convert"))


@pytest.fixture(scope="module")
def whole(teacher):
    """A conversion that nothing interrupted."""
    output = teacher.folder / "whole"
    return output, run(teacher, output)


def test_an_artifact_is_whole(whole, teacher):
    output, report = whole
    names = {path.name for path in output.iterdir()}
    assert names >= {
        "README.md", "config.json", "linearize.json", "model.safetensors", "recipe.yaml", "tokenizer.json",
        "modeling_linearized.py", "configuration_linearized.py", "log.jsonl",
    }  # fmt: skip
    assert not [name for name in names if "partial" in name]
    assert not (teacher.folder / "whole.partial").exists()
    saved = json.loads((output / "linearize.json").read_text())
    assert saved == {key: value for key, value in report.items() if key != "output"}
    assert set(saved) == {
        "schema", "base_model", "method", "layers", "seq_len", "tokens", "perplexity", "ablation", "self_check",
        "state_bytes", "kv_bytes_per_token", "seconds", "versions", "keep_softmax", "plan",
        "checksums", "fingerprint", "card", "command", "origin", "sum",
    }  # fmt: skip
    assert saved["layers"] == {
        "linear": ["model.layers.0.self_attn", "model.layers.1.self_attn"],
        "softmax": [],
    }
    assert saved["tokens"] == {"transfer": 8 * 64, "distill": 12 * 64}
    assert saved["kv_bytes_per_token"] == 2 * 2 * 8 * 4  # layers, k and v, one head of 8, fp32
    config = json.loads((output / "config.json").read_text())
    assert config["model_type"] == "linearized"
    assert {"AutoConfig", "AutoModelForCausalLM"} <= set(config["auto_map"])


def test_its_numbers_are_those_of_the_saved_model(whole, teacher):
    output, report = whole
    model, tokenizer = load(output)
    _, held = data.hold_out(data.open_source(teacher.text))
    blocks = data.evaluation_blocks(held, tokenizer, 16)
    assert perplexity(model, blocks) == pytest.approx(report["perplexity"]["recovered"], rel=1e-5)
    from linearize_cli.models.load import load_teacher

    original, _ = load_teacher(teacher.path)
    assert perplexity(original, blocks) == pytest.approx(report["perplexity"]["teacher"], rel=1e-6)
    assert report["ablation"]["full"] == report["perplexity"]["recovered"]
    assert report["ablation"]["local_only"] != report["ablation"]["full"] != report["ablation"]["linear_only"]


def test_training_lowers_the_losses(teacher):
    """Beside runs that hardly move, whose batches are the same: on random text they differ more than steps do."""
    found, rates = {}, ("recover.transfer.lr=1e-2", "recover.distill.lr=1e-3")
    for stage in ("none", "transfer", "distill"):
        still = () if stage == "none" else (f"recover.{stage}.lr=1e-9",)
        output = teacher.folder / f"still-{stage}"
        run(teacher, output, tokens=16 * 4 * 150, overrides=(*SMALL["overrides"], *rates, *still))
        found[stage] = losses(output)

    def late(stage: str, loss: dict) -> float:
        return statistics.mean(value for (name, step), value in loss.items() if name == stage and step > 30)

    assert late("transfer", found["none"]) < 0.9 * late("transfer", found["transfer"])
    assert late("distill", found["none"]) < late("distill", found["distill"])


def test_without_training_only_the_swap_is_measured(teacher):
    output = teacher.folder / "swapped"
    report = run(teacher, output, train=False)
    assert report["tokens"] == {"transfer": None, "distill": None}
    assert report["perplexity"]["transferred"] is None and report["perplexity"]["recovered"] is None
    assert report["perplexity"]["swapped"] > 0
    bare = convert(teacher.path, teacher.folder / "bare", train=False)
    assert set(bare["perplexity"].values()) == {None}


def converted(teacher, method, name, **changes):
    """Convert the teacher to a method with a small window, and return the folder and the report."""
    output = teacher.folder / f"{name}-{method.replace(':', '-over-')}"
    overrides = ("attention.local.size=4",) if load_recipe(method).attention.local else ()
    return output, run(teacher, output, method=method, overrides=overrides, **changes)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_converts_reloads_and_verifies(method, teacher, monkeypatch):
    """Without the statistics of sampling, which no method changes: they follow from the logits of trees."""
    output, report = converted(teacher, method, "trained", tokens=16 * 4 * 10)
    monkeypatch.setattr(verification, "MEASURING", {})
    assert max(report["self_check"].values()) < 1e-4
    assert math.isfinite(report["perplexity"]["recovered"])
    model, tokenizer = load(output)
    assert verify_model(model, tokenizer, prompts=["a fox", "sat"], max_new=12)["verdict"] == "EXACT"


@pytest.mark.slow
@pytest.mark.parametrize("method", method_names())
def test_every_method_samples_from_its_distribution(method, teacher, monkeypatch):
    output, _ = converted(teacher, method, "sampled", train=False)
    for checks in ("DECODING", "THOROUGH"):
        monkeypatch.setattr(verification, checks, {})
    model, tokenizer = load(output)
    report = verify_model(model, tokenizer, prompts=["a fox", "sat"], max_new=12)
    assert report["failed"] == [] and report["sampling"]["tokens"] >= 1024 and report["speed"]["ratio"] > 0


def test_layers_are_kept_and_the_adapter_too(teacher):
    output = teacher.folder / "hybrid"
    report = run(teacher, output, keep_softmax="at:1", keep_adapter=True)
    assert report["layers"] == {
        "linear": ["model.layers.0.self_attn"],
        "softmax": ["model.layers.1.self_attn"],
    }
    assert (output / "adapter" / "adapter_model.safetensors").exists()
    model, _ = load(output)
    assert not hasattr(model.model.layers[1].self_attn, "linear_attention")


def test_the_teacher_writes_its_own_corpus(teacher, monkeypatch):
    output, texts, clear = teacher.folder / "self", [], Workspace.clear

    def keep_corpus(self):
        corpus = self.path / "self.jsonl"
        texts.extend(corpus.read_text().splitlines() if corpus.exists() else ())
        clear(self)

    monkeypatch.setattr(Workspace, "clear", keep_corpus)
    changes = {**SMALL, "data": ("self",), "eval_data": teacher.text, "batch_size": 4}
    report = convert(teacher.path, output, **changes)
    assert report["perplexity"]["recovered"] > 0
    assert sum(json.loads(text)["tokens"] for text in texts) >= SMALL["tokens"] and len(set(texts)) > 8


def test_a_dry_run_writes_nothing(teacher):
    before = sorted(teacher.folder.iterdir())
    plan = run(teacher, teacher.folder / "dry", dry_run=True)
    assert plan["layers"]["linear"] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert sorted(teacher.folder.iterdir()) == before


def test_an_existing_folder_needs_force(teacher, whole):
    output = teacher.folder / "again"
    run(teacher, output, train=False)
    with pytest.raises(UserError, match="--force"):
        run(teacher, output, train=False)
    old = (output / "linearize.json").read_text()
    run(teacher, output, train=False, keep_softmax="at:1", force=True)
    assert (output / "linearize.json").read_text() != old
    assert not output.with_name("again.partial").exists()


def test_force_deletes_artifacts_and_nothing_else(teacher):
    output = teacher.folder / "precious"
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="do not belong to an artifact"):
        run(teacher, output, train=False, force=True)
    assert (output / "thesis.tex").read_text() == "years of work"


def test_a_linearized_model_is_not_converted_again(whole, teacher):
    with pytest.raises(UserError, match="already a linearized model"):
        convert(str(whole[0]), teacher.folder / "twice", train=False)


def test_a_model_whose_forms_disagree_is_refused(teacher, monkeypatch):
    """A layer that forgets its last tokens while decoding: the self-check sees it, and nothing is left."""
    from linearize_cli.runtime.cache import LinearCacheLayer

    append = LinearCacheLayer.append

    def forgetful(self, attention, state, k, v, valid):
        state.recent_v.zero_()
        append(self, attention, state, k, v, valid)

    monkeypatch.setattr(LinearCacheLayer, "append", forgetful)
    output = teacher.folder / "refused"
    with pytest.raises(CheckFailed, match="incremental"):
        run(teacher, output, train=False)
    assert not output.exists() and not output.with_name("refused.partial").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(tokens=10), "less than one batch"),
        (dict(seq_len=10_000), "context"),
        (dict(keep_softmax="2"), "--keep-softmax"),
        (dict(keep_softmax="at:7"), "--keep-softmax"),
        (dict(keep_softmax="at:0,1"), "--keep-softmax"),
        (dict(overrides=("attention.local.size=5000",)), "attention.local.size 5000"),
        (dict(overrides=("attention.conv.width=5000",)), "attention.conv.width 5000"),
        (dict(train=False, keep_adapter=True), "--keep-adapter"),
        (dict(tokens=10, dry_run=True), "less than one batch"),
        (dict(resume=True, force=True), "nothing to resume"),
        (dict(data=("",)), "SRC is empty"),
        (dict(device="meta"), "meta"),
        (dict(dtype="int8"), "int8"),
        (dict(keep_softmax="x"), "--keep-softmax"),
        (dict(method="no-such"), "no method"),
        (dict(overrides=("attention.x=1",)), "attention.x"),
        (dict(data=("absent.jsonl",)), "no such data"),
        (dict(eval_data="absent.jsonl"), "no such data"),
        (dict(resume=True), "nothing to resume"),
        (dict(device="cuda:99"), "cuda:99"),
        (dict(dtype="float3"), "float3"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(changes, words, teacher):
    before = sorted(teacher.folder.iterdir())
    arguments = {"data": (teacher.text,), "batch_size": 4, **SMALL, **changes}
    with pytest.raises(UserError, match=words):
        convert(teacher.path, teacher.folder / "bad", **arguments)
    assert sorted(teacher.folder.iterdir()) == before


def test_a_full_disk_is_told_before_anything_is_written(teacher, monkeypatch):
    before = sorted(teacher.folder.iterdir())
    usage = shutil.disk_usage(teacher.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match="disk space"):
        run(teacher, teacher.folder / "full")
    assert sorted(teacher.folder.iterdir()) == before


def test_a_disk_that_fills_up_is_told(teacher, monkeypatch):
    import errno

    from linearize_cli.conversion import pipeline

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pipeline, "save_report", full)
    output = teacher.folder / "filled"
    with pytest.raises(UserError, match="disk is full"):
        run(teacher, output, train=False)
    assert not output.exists() and not output.with_name("filled.partial").exists()
