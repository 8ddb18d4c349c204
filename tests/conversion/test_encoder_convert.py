"""Encoders and encoder-decoders through the whole pipeline, on checkpoints made here."""

import json
import math
import random

import pytest
import torch
import transformers
from convert_case import losses
from encoders import WORDS, tiny_model, tokenizer
from transformers import AutoModelForCausalLM

from linearize_cli import convert, load, verify
from linearize_cli.conversion.inspect import inspect
from linearize_cli.data import sources as data
from linearize_cli.errors import UserError
from linearize_cli.metrics.perplexity import perplexity
from linearize_cli.models.batch import IGNORED
from linearize_cli.models.load import load_teacher
from linearize_cli.models.positions import context_length
from linearize_cli.models.tasks import task_of
from linearize_cli.runtime import layer as runtime_layer
from linearize_cli.speculative.generate import generate

KINDS = {
    "albert": "AutoModelForMaskedLM",
    "bert": "AutoModelForMaskedLM",
    "roberta-classifier": "AutoModelForSequenceClassification",
    "modernbert": "AutoModelForMaskedLM",
    "t5": "AutoModelForSeq2SeqLM",
    "bart": "AutoModelForSeq2SeqLM",
}
PARTS = (
    "attention.local.size=4",
    "attention.conv.width=3",
    "attention.far.key_weight=false",
)  # a start far off
SMALL = dict(
    overrides=(*PARTS, "recover.transfer.share=0.4"),
    seq_len=32,
    batch_size=4,
    tokens=32 * 4 * 100,
)
DECODING = ("prefill_vs_decode", "chunked_vs_decode")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random checkpoints with weights large enough that attention matters, and 150 lines of their words."""
    folder = tmp_path_factory.mktemp("encoders")
    for family in KINDS:
        model = tiny_model(family, **({"num_decoder_layers": 2} if family == "t5" else {}))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.15)
        model.save_pretrained(folder / family)
        tokenizer(sentinels=family == "t5").save_pretrained(folder / family)
    rng = random.Random(0)
    lines = (" ".join(rng.choices(WORDS, k=40)) for _ in range(150))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module", params=KINDS)
def converted(request, folder):
    """A family, the folder of its artifact, and the report."""
    output = folder / f"{request.param}-linear"
    return request.param, output, run(folder, request.param, output)


def run(folder, family, output, **changes):
    return convert(str(folder / family), output, data=(str(folder / "text.jsonl"),), **{**SMALL, **changes})


def test_recovery_brings_it_back_to_the_teacher(converted):
    family, output, report = converted
    measured = report["kl"] if "classifier" in family else report["perplexity"]
    if "classifier" in family:
        assert set(report["perplexity"].values()) == set(report["ablation"].values()) == {None}
        assert measured["recovered"] < 0.5 * measured["swapped"]
    else:
        assert all(math.isfinite(value) for value in measured.values())
        assert "kl" not in report
    loss = losses(output)
    for stage, factor in (("transfer", 1.0), ("distill", 0.8)):
        values = [value for (name, _), value in loss.items() if name == stage]
        assert sum(values[-8:]) < factor * sum(values[:8]), stage
    check = report["self_check"]
    assert (check["incremental"] is None) == (family not in ("t5", "bart"))
    assert all(value is None or value < 1e-4 for value in check.values())
    assert report == {**json.loads((output / "linearize.json").read_text()), "output": str(output)}


def test_the_artifact_says_what_loads_it(converted):
    family, output, report = converted
    auto_class = KINDS[family]
    config = json.loads((output / "config.json").read_text())
    assert {"AutoConfig", auto_class} <= set(config["auto_map"])
    card = (output / "README.md").read_text()
    assert f"from transformers import {auto_class}, AutoTokenizer" in card
    assert f"pipeline_tag: {report['task']}" in card
    with pytest.raises(ValueError, match=auto_class):
        AutoModelForCausalLM.from_pretrained(output)


def test_its_numbers_are_those_of_the_saved_model(converted, folder):
    family, output, report = converted
    model, tokens = load(output)
    if "classifier" in family:
        return
    _, held = data.hold_out(data.open_source(str(folder / "text.jsonl")))
    blocks = data.evaluation_blocks(held, tokens, 32)
    for batch_size in (1, 8):
        measured = perplexity(model, blocks, batch_size, task=task_of(model, tokens))
        assert measured == pytest.approx(report["perplexity"]["recovered"], rel=1e-5)


def test_verify(converted):
    family, output, _ = converted
    report = verify(output, max_new=8)
    assert report["verdict"] == "EXACT"
    if family in ("t5", "bart"):
        assert report["greedy"]["tokens"] == 8 * 8 and "reload" not in report
        assert all(report["forms"][form] is not None for form in DECODING)
    else:
        assert report["greedy"] is report["rollback"]["max_abs_diff"] is None
        assert set(report["forms"].values()) == {None}
        assert report["reload"]["max_abs_diff"] == 0


def test_generate_answers_or_refuses(converted, capsys):
    family, output, _ = converted
    if family in ("t5", "bart"):
        result = generate(str(output), "word1 word2 word3", max_new=6)
        assert 1 <= len(result["tokens"]) <= 6
        with pytest.raises(UserError, match="is no causal language model"):
            generate(str(output), "word1 word2 word3", max_new=6, speculative="lookup")
    else:
        with pytest.raises(UserError, match="is an encoder .*cannot generate text"):
            generate(str(output), "word1", max_new=6)


@pytest.mark.parametrize("family", KINDS)
def test_the_checkpoint_names_its_class(family, folder):
    model, _ = load_teacher(str(folder / family))
    assert type(model) is type(tiny_model(family))
    report = inspect(str(folder / family))
    assert bool(report["state_bytes"]) == bool(report["kv_bytes_per_token"]) == (family in ("t5", "bart"))


@pytest.mark.parametrize("keep", [None, "at:3"])
def test_cross_attention_can_be_linear(keep, folder):
    output = folder / f"cross-{keep is None}"
    overrides = (*SMALL["overrides"], "attention.cross=linear")
    report = run(folder, "t5", output, overrides=overrides, keep_softmax=keep, tokens=32 * 4 * 8)
    assert len(report["layers"]["linear"]) == 6 - (keep is not None)
    assert verify(output, max_new=4)["verdict"] == "EXACT"


def test_layers_are_kept_by_divergence(folder):
    output = folder / "auto"
    report = run(folder, "roberta-classifier", output, keep_softmax="auto:1", train=False)
    kl = report["keep_softmax"]["kl"]
    assert min(kl, key=kl.get) == report["keep_softmax"]["kept"][0] == report["layers"]["softmax"][0]
    assert verify(output)["verdict"] == "EXACT"


@pytest.mark.parametrize("keep", ["at:0", "at:2", "at:1,2,3"])
def test_layers_beside_kept_ones(keep, folder):
    """An encoder's layer, the decoder's that makes the position biases, and all but one."""
    output = folder / f"kept-{keep.replace(':', '-')}"
    report = run(folder, "t5", output, keep_softmax=keep, train=False)
    assert len(report["layers"]["linear"]) == 4 - len(keep.split(","))
    assert max(report["self_check"].values()) < 1e-4
    assert verify(output, max_new=4)["verdict"] == "EXACT"


def test_hidden_states_are_learnt_too(folder):
    output = folder / "hidden"
    overrides = (*SMALL["overrides"], "recover.distill.hidden=1", "recover.distill.kl=0")
    report = run(folder, "roberta-classifier", output, overrides=overrides)
    assert report["kl"]["recovered"] < 0.5 * report["kl"]["swapped"]


def test_without_architectures_an_encoder_is_a_masked_language_model(folder, tmp_path):
    for file in (folder / "bert").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert type(load_teacher(str(tmp_path))[0]) is transformers.BertForMaskedLM


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("bert", dict(method="gated-delta"), "attention.memory.kind of gated-delta runs forward in time"),
        ("bart", dict(method="retention"), "attention.memory.kind of retention runs forward in time"),
        ("roberta-classifier", dict(overrides=("recover.distill.ce=1",)), "recover.distill.ce 1 needs"),
        ("bert", dict(data=("self",)), "--data self: BertForMaskedLM cannot generate training text"),
        (
            "bert",
            dict(overrides=("recover.separate_documents=true",)),
            "recover.separate_documents: BertForMaskedLM is not a causal",
        ),
        ("t5", dict(overrides=("recover.assistant_only=true",)), "recover.assistant_only: T5"),
        ("roberta-classifier", dict(seq_len=130), "context of 128"),
        (
            "bert",
            dict(overrides=("attention.cross=linear",)),
            "no layer of BertForMaskedLM .* cross-attention",
        ),
        ("bart", dict(overrides=("attention.cross=relu",)), "attention.cross: 'relu' should be"),
        (
            "bart",
            dict(method="window", overrides=("attention.cross=linear",)),
            "attention.cross, .* positive",
        ),
        ("t5", dict(keep_softmax="auto:1"), "cannot stay softmax: .* from decoder.block.0"),
        ("t5", dict(keep_softmax="at:3"), r"decoder.block.1.* cannot stay softmax: .* from decoder.block.0"),
    ],
)
def test_what_does_not_fit_is_refused(family, changes, words, folder):
    before = sorted(folder.iterdir())
    with pytest.raises(UserError, match=words):
        convert(
            str(folder / family),
            folder / "bad",
            **{**SMALL, "overrides": (), "data": (str(folder / "text.jsonl"),), **changes},
        )
    assert sorted(folder.iterdir()) == before


def test_a_tokenizer_without_a_mask_is_refused(folder, tmp_path):
    for file in (folder / "bert").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["mask_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="the tokenizer of BertForMaskedLM has no mask token"):
        convert(str(tmp_path), tmp_path / "out", data=(str(folder / "text.jsonl"),), **SMALL)


def task(family, sentinels=False):
    return task_of(tiny_model(family), tokenizer(sentinels))


IDS = torch.arange(25, 25 + 2 * 32).view(2, 32)


def test_masked_tokens():
    batch = task("bert").batch(IDS)
    ids, labels = batch.inputs["input_ids"], batch.labels
    hidden = labels != IGNORED
    assert hidden.sum(-1).tolist() == [5, 5] and not hidden[:, [0, -1]].any()
    assert (ids[hidden] == 3).all() and torch.equal(labels[hidden], IDS[hidden])
    assert (ids[:, 0] == 0).all() and (ids[:, -1] == 2).all()
    inner = ~hidden
    inner[:, [0, -1]] = False
    assert torch.equal(ids[inner], IDS[inner])
    assert not torch.equal(hidden[0], hidden[1])
    assert torch.equal(task("bert").batch(IDS[1:]).inputs["input_ids"], ids[1:])


def test_spans_behind_sentinels_make_the_text_whole():
    mark = task("t5", sentinels=True)
    mark.before = []
    batch = mark.batch(IDS)
    for source, labels, row in zip(batch.inputs["input_ids"], batch.labels, IDS, strict=True):
        sentinels, answers = range(5, 25), {}
        for token in labels.tolist()[:-1]:
            if token in sentinels and token not in answers:
                answers[token] = []
            else:
                answers[max(answers)].append(token)
        text = []
        for token in source.tolist()[:-1]:
            text += answers[token] if token in sentinels and token in answers else [token]
        assert text == row.tolist()[:31]
    assert (batch.inputs["decoder_input_ids"][:, 0] == 1).all()
    assert torch.equal(batch.inputs["decoder_input_ids"][:, 1:], batch.labels[:, :-1])


def test_infilling_asks_for_the_whole_text():
    batch = task("bart").batch(IDS)
    assert torch.equal(batch.labels[:, 1:-1], IDS[:, :30])
    source = batch.inputs["input_ids"]
    assert ((source == 3).sum(-1) == 1).all() and source.shape[1] < 32


def test_context_of_positions_that_count_from_the_pad():
    assert context_length(tiny_model("roberta")) == 128
    assert context_length(tiny_model("bert")) == context_length(tiny_model("bart")) == 130


def test_pads_that_count_as_tokens_are_found(converted, monkeypatch):
    family, output, _ = converted
    monkeypatch.setattr(runtime_layer, "valid_tokens", lambda *args: None)
    report = verify(output, max_new=2, quick=True, write=False)
    assert report["verdict"] == "FAIL" and "padding" in report["failed"]
