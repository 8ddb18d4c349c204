"""Encoders without a head, alone and in folders of sentence-transformers, through the whole pipeline."""

import json
import random
import shutil

import pytest
import torch
import transformers
import yaml
from encoders import BODIES, WORDS, swapped, tiny_model, tokenizer

from linearize_cli import convert, load, verify
from linearize_cli.conversion.layer_selection import plan_layers
from linearize_cli.errors import UserError
from linearize_cli.metrics.benchmark import bench
from linearize_cli.metrics.embeddings import rank_correlation
from linearize_cli.metrics.evaluation import evaluate
from linearize_cli.models.distances import pool
from linearize_cli.models.encoders import Embedding
from linearize_cli.models.load import load_teacher
from linearize_cli.models.sentence_folder import SentenceFolder
from linearize_cli.models.tasks import task_of
from linearize_cli.speculative.generate import generate

PARTS = ("attention.local.size=4", "attention.conv.width=3", "attention.far.key_weight=false")
SMALL = dict(overrides=(*PARTS, "recover.transfer.share=0.4"), seq_len=32, batch_size=4, tokens=32 * 4 * 60)
LIBRARY = "sentence_transformers.models."
MODULES = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]


def write_modules(folder, modules=MODULES, library=LIBRARY, **pooling):
    entries = [
        {"idx": i, "name": str(i), "path": path, "type": library + kind}
        for i, (path, kind) in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": 32, **pooling}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 64}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A plain body, the same in folders with mean and cls pooling, and 150 lines of its words."""
    folder = tmp_path_factory.mktemp("embeddings")
    model = tiny_model("bert-body")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    model.save_pretrained(folder / "plain")
    tokenizer().save_pretrained(folder / "plain")
    for name, pooling in {"mean": {"pooling_mode": "mean"}, "cls": {"pooling_mode_cls_token": True}}.items():
        shutil.copytree(folder / "plain", folder / name)
        write_modules(folder / name, **pooling)
    rng = random.Random(0)
    lines = (" ".join(rng.choices(WORDS, k=40)) for _ in range(150))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return folder


def run(folder, name, output, **changes):
    return convert(
        str(folder / name), folder / output, data=(str(folder / "text.jsonl"),), **{**SMALL, **changes}
    )


@pytest.fixture(scope="module", params=["plain", "mean", "cls"])
def converted(request, folder):
    """The kind of pooling, the artifact and its report."""
    name = request.param
    return name, folder / f"{name}-linear", run(folder, name, f"{name}-linear")


def test_recovery_brings_the_embeddings_back(converted):
    _, output, report = converted
    distance = report["embedding_distance"]
    assert distance["recovered"] < 0.5 * distance["swapped"] and distance["local_only"] is not None
    assert set(report["perplexity"].values()) == set(report["ablation"].values()) == {None}
    assert report["task"] == "feature-extraction" and "kl" not in report
    weights = yaml.safe_load((output / "recipe.yaml").read_text())["recover"]["distill"]
    assert (weights["kl"], weights["hidden"], weights["embedding"]) == (0, 1, 1)


def test_the_artifact_holds_what_its_users_load(converted):
    name, output, report = converted
    model, tokens = load(output)
    assert isinstance(task_of(model, tokens), Embedding) and type(model).__name__ == "LinearizedBertModel"
    card = (output / "README.md").read_text()
    assert "from transformers import AutoModel, AutoTokenizer" in card and "SentenceTransformer(path" in card
    carried = {"modules.json", "1_Pooling/config.json", "sentence_bert_config.json"}
    assert carried & report["checksums"].keys() == (set() if name == "plain" else carried)
    assert task_of(model, tokens).pooling == ("cls" if name == "cls" else "mean")


def test_verify_and_eval(converted, folder):
    _, output, _ = converted
    found = verify(output)
    assert found["verdict"] == "EXACT" and found["reload"]["max_abs_diff"] == 0
    assert found["fingerprint"]["max_abs_diff"] < 1e-5
    (row,) = evaluate(output, data=str(folder / "text.jsonl"))["embeddings"]
    assert 0 < row["distance"] < 0.1 and 0.5 < row["rank_correlation"] < 1
    timed = bench(output, context=[16], seconds=0, write=False)["rows"]
    assert {(row["phase"], row["reason"]) for row in timed} == {("prefill", None), ("train", None)}
    with pytest.raises(UserError, match="is an encoder .* cannot generate"):
        generate(str(output), "word1", max_new=4)


def test_another_pooling_is_found(folder, tmp_path):
    run(folder, "mean", "pooled", train=False)
    shutil.copytree(folder / "pooled", tmp_path / "other")
    config = tmp_path / "other/1_Pooling/config.json"
    config.write_text(json.dumps({"pooling_mode": "cls"}))
    assert verify(tmp_path / "other", write=False)["failed"] == ["files", "fingerprint"]


def test_layers_are_kept_by_the_distance_of_embeddings(folder):
    report = run(folder, "plain", "auto", keep_softmax="auto:1", train=False)
    found = report["keep_softmax"]["embedding_distance"]
    assert min(found, key=found.get) == report["keep_softmax"]["kept"][0]
    assert verify(folder / "auto", write=False)["verdict"] == "EXACT"


def test_the_plan_has_the_weights_of_the_task(folder):
    plan = convert(str(folder / "mean"), dry_run=True, flops=1e9, seq_len=32)
    distill = plan["recipe"]["recover"]["distill"]
    assert (distill["kl"], distill["embedding"]) == (0, 1) and len(plan["layers"]["linear"]) == 3


def test_weights_of_the_recipe_stay(folder):
    overrides = (*SMALL["overrides"], "recover.distill.embedding=3")
    run(folder, "plain", "weighted", overrides=overrides, train=False)
    weights = yaml.safe_load((folder / "weighted/recipe.yaml").read_text())["recover"]["distill"]
    assert (weights["kl"], weights["hidden"], weights["embedding"]) == (0, 0, 3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(overrides=("recover.distill.ce=1",)), "recover.distill.ce 1 needs labels"),
        (dict(medusa_heads=2), "--medusa-heads: BertModel is not a causal"),
        (dict(data=("self",)), "--data self: BertModel cannot generate"),
    ],
)
def test_what_does_not_fit_is_refused(changes, words, folder):
    with pytest.raises(UserError, match=words):
        convert(str(folder / "plain"), folder / "bad", **{"data": (str(folder / "text.jsonl"),), **changes})


@pytest.mark.parametrize("family", BODIES)
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_pads_change_no_embedding(family, pooling):
    model = swapped(family)
    task = task_of(model, tokenizer())
    task.pooling, rows = pooling, [torch.arange(5, 5 + n) for n in (30, 1, 17, 9)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1)
    with torch.no_grad():
        states, mask = task.encode(model, rows, extra=0)
        together = pool(states, mask, pooling)
        for row, embedding in zip(rows, together, strict=True):
            torch.testing.assert_close(embedding, task.last_logits(model, row), atol=1e-5, rtol=0)
    assert torch.equal(mask, (ids != 1).long()) and together.std() > 0.01


@pytest.mark.parametrize("family", BODIES)
def test_every_layer_of_a_body_converts(family):
    layers = plan_layers(tiny_model(family))
    assert len(layers) == 3 and not any(layer.refusal or layer.causal for layer in layers)


def test_the_class_that_is_loaded(folder, tmp_path):
    """A folder with pooling has no head, whatever its architecture; a plain masked model keeps its own."""
    for name, expected in {"mean": transformers.BertModel, "plain": transformers.BertForMaskedLM}.items():
        shutil.copytree(folder / name, tmp_path / name)
        if name == "plain":
            tiny_model("bert").save_pretrained(tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(
            json.dumps({**config, "architectures": ["BertForMaskedLM"]})
        )
        assert type(load_teacher(str(tmp_path / name))[0]) is expected


@pytest.mark.parametrize(
    ("modules", "pooling", "words"),
    [
        ([("0_Transformer", "Transformer"), *MODULES[1:]], {}, "the first module is Transformer in `0_Tr"),
        ([MODULES[0], ("../1_Pooling", "Pooling")], {}, "names a module's folder '../1_Pooling'"),
        (MODULES, {"pooling_mode": "max"}, "the pooling max cannot be recovered, only mean or cls"),
        (MODULES, {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "cannot be recovered"),
    ],
)
def test_folders_that_are_refused(modules, pooling, words, folder, tmp_path):
    shutil.copytree(folder / "plain", tmp_path / "bad")
    write_modules(tmp_path / "bad", modules, **pooling)
    with pytest.raises(UserError, match=words):
        load_teacher(str(tmp_path / "bad"))


def test_code_and_damage_in_a_folder_are_refused(folder, tmp_path):
    shutil.copytree(folder / "mean", tmp_path / "own")
    write_modules(tmp_path / "own", library="custom.")
    with pytest.raises(UserError, match="a module that is not the library's own: custom.Transformer"):
        SentenceFolder.read(tmp_path / "own")
    (tmp_path / "own/modules.json").write_text('[{"type": "x"}]')
    with pytest.raises(UserError, match="is not a list of modules with a type and a path"):
        SentenceFolder.read(tmp_path / "own")
    write_modules(tmp_path / "own", [MODULES[0], ("1_SpladePooling", "SpladePooling")])
    assert SentenceFolder.read(tmp_path / "own") is None


def test_rank_correlation():
    teacher = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
    assert rank_correlation(teacher, 3 * teacher) == pytest.approx(1)
    assert 0.8 > rank_correlation(teacher, teacher + noise) > 0.2
    assert rank_correlation(teacher[:2], teacher[:2]) is None


@pytest.mark.parametrize("name", ["plain", "mean", "cls"])
def test_sentence_transformers_gives_the_same_embeddings(name, folder):
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    run(folder, name, f"{name}-library", train=False)
    model = library.SentenceTransformer(str(folder / f"{name}-library"), trust_remote_code=True)
    own, tokens = load(folder / f"{name}-library")
    task, texts = task_of(own, tokens), ["word1 word2", " ".join(WORDS[:40])]
    for text, embedding in zip(texts, model.encode(texts, convert_to_tensor=True), strict=True):
        with torch.no_grad():
            expected = task.last_logits(own, torch.tensor(tokens(text)["input_ids"]))
        if name != "plain":
            expected = torch.nn.functional.normalize(expected, dim=-1)
        torch.testing.assert_close(embedding.cpu(), expected, atol=1e-5, rtol=0)
