"""`--keep-softmax auto:N`: which layers are kept, that they are the teacher's, and what is refused."""

import json
from itertools import islice

import pytest
import torch
from convert_case import make_teacher, run
from families import AUGMENTED, swapped, tiny_model
from safetensors.torch import load_file

from linearize_cli import convert, load
from linearize_cli.cli import main
from linearize_cli.conversion.layer_selection import choose_layers, plan_layers
from linearize_cli.conversion.softmax_selection import Restorer, best, repeated
from linearize_cli.data import sources as data
from linearize_cli.errors import UserError
from linearize_cli.models.batch import Blocks
from linearize_cli.models.load import load_teacher
from linearize_cli.runtime import linearize

FAMILIES = ["llama", "gpt2", "gemma2", "mistral", "gpt-oss", "gemma3n", "bloom", "falcon-alibi"]
LAYERS = [f"model.layers.{i}.self_attn" for i in range(4)]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("convert"), layers=4)


@torch.no_grad()
def kl(teacher, student, blocks) -> float:
    """KL(teacher ‖ student), by its definition."""
    p, q = (model(blocks, use_cache=False).logits.double().softmax(-1) for model in (teacher, student))
    return (p * (p / q).log()).sum(-1).mean().item()


def test_the_choice_without_training_is_that_of_conversions_one_by_one(teacher):
    """Every divergence is that of an artifact with this layer kept, on the evaluation text."""
    common = dict(train=False, method="augmented:relu")  # whose parts do not start by chance
    report = run(teacher, teacher.folder / "auto", keep_softmax="auto:2", **common)
    original, tokenizer = load_teacher(teacher.path)
    _, held = data.hold_out(data.open_source(teacher.text))
    blocks = data.evaluation_blocks(held, tokenizer, 16)[: 4 * 4]  # four batches of four
    copied = torch.cat([blocks[:8, :8], blocks[:8, :8]], 1)  # two batches that repeat their first half
    expected, repeated = {}, {}
    for name, keep in [("none", None), *((name, f"at:{i}") for i, name in enumerate(LAYERS))]:
        run(teacher, teacher.folder / name, keep_softmax=keep, **common)
        student = load(teacher.folder / name)[0]
        expected[name], repeated[name] = kl(original, student, blocks), kl(original, student, copied)
    assert report["keep_softmax"]["kl"] == pytest.approx(expected, rel=1e-4)
    assert report["keep_softmax"]["repeated_kl"] == pytest.approx(repeated, rel=1e-4)
    shares = {name: expected[name] / expected["none"] + repeated[name] / repeated["none"] for name in LAYERS}
    lowest = sorted(LAYERS, key=shares.get)[:2]
    assert set(report["keep_softmax"]["kept"]) == set(report["layers"]["softmax"]) == set(lowest)
    assert len({round(value, 6) for value in expected.values()}) == 5
    by_hand = f"at:{','.join(str(LAYERS.index(name)) for name in lowest)}"
    kept = run(teacher, teacher.folder / "by-hand", keep_softmax=by_hand, **common)
    for key in ("layers", "perplexity", "ablation", "state_bytes", "kv_bytes_per_token"):
        assert report[key] == kept[key], key
    assert kept["keep_softmax"] is None
    configs = [json.loads((teacher.folder / x / "config.json").read_text()) for x in ("auto", "by-hand")]
    assert configs[0] == configs[1]
    weights = [load_file(teacher.folder / x / "model.safetensors") for x in ("auto", "by-hand")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_choice_is_made_after_transfer_on_training_text(teacher):
    only_transfer = ("attention.local.size=4", "attention.conv.width=3", "recover.transfer.share=1.0")
    report = run(teacher, teacher.folder / "chosen", keep_softmax="auto:1", overrides=only_transfer)
    run(teacher, teacher.folder / "linear", overrides=only_transfer)
    original, tokenizer = load_teacher(teacher.path)
    text, _ = data.hold_out(data.open_source(teacher.text))
    blocks = torch.cat([batch.ids for batch in islice(data.batches(text, tokenizer, 16, 4), 8)])
    measured = report["keep_softmax"]["kl"]
    assert measured["none"] == pytest.approx(
        kl(original, load(teacher.folder / "linear")[0], blocks), rel=1e-4
    )
    kept = report["keep_softmax"]["kept"]
    assert measured[kept[0]] < measured["none"]
    assert measured[kept[0]] == pytest.approx(
        kl(original, load(teacher.folder / "chosen")[0], blocks), rel=1e-4
    )


def test_kept_layers_are_the_teachers(teacher):
    output = teacher.folder / "trained"
    report = run(teacher, output, keep_softmax="auto:2", keep_adapter=True)
    kept, linear = report["keep_softmax"]["kept"], report["layers"]["linear"]
    assert report["layers"]["softmax"] == kept and sorted([*kept, *linear]) == LAYERS
    saved, original = load_file(output / "model.safetensors"), load_file(f"{teacher.path}/model.safetensors")
    for name in LAYERS:
        own = {key for key in saved if key.startswith(name)}
        native = {key for key in original if key.startswith(name)}
        if name in kept:
            assert own == native and all(torch.equal(saved[key], original[key]) for key in own)
        else:
            assert own > native and not any(torch.equal(saved[key], original[key]) for key in native)
    records = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    (record,) = [record for record in records if record["stage"] == "keep_softmax"]
    assert {key: record[key] for key in ("kl", "repeated_kl", "kept")} == report["keep_softmax"]
    order = [record["stage"] for record in records]
    assert order.index("keep_softmax") == order.index("distill") - 2  # the perplexity between is theirs
    config = json.loads((output / "config.json").read_text())["linearize"]
    assert list(config["layers"]) == linear and config["softmax"] == kept
    model, _ = load(output)
    assert all(hasattr(model.get_submodule(name), "linear_attention") == (name in linear) for name in LAYERS)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_restored_layer_is_one_that_was_kept(family):
    """The model with one layer restored, for a while and for good, is that converted without it."""
    model = tiny_model(family)
    linear, softmax = choose_layers(plan_layers(model))
    restorer = Restorer(model, [layer.name for layer in linear])
    record = {
        "base_class": type(model).__name__,
        "base_model_type": model.config.model_type,
        "method": "test",
        "attention": AUGMENTED,
        "layers": {layer.name: layer.geometry for layer in linear},
        "softmax": [layer.name for layer in softmax],
    }
    linearize(model, record)
    kept = swapped(family, keep=1)
    model.load_state_dict({**model.state_dict(), **kept.state_dict()})
    ids = torch.randint(3, 99, (2, 30), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    with torch.no_grad():
        expected, padded = kept(ids).logits, kept(ids, attention_mask=mask).logits[mask > 0]
        before = model(ids).logits
        with restorer.restored(linear[-1].name):
            assert torch.equal(model(ids).logits, expected)
            assert torch.equal(model(ids, attention_mask=mask).logits[mask > 0], padded)
        assert torch.equal(model(ids).logits, before) and not torch.equal(before, expected)
        restorer.restore([linear[-1].name])
        assert torch.equal(model(ids).logits, expected)
        assert torch.equal(model(ids, attention_mask=mask).logits[mask > 0], padded)
    kept.config.linearize["softmax"].sort()
    assert model.config.linearize == kept.config.linearize
    assert model.state_dict().keys() == kept.state_dict().keys()
    implementations = [
        {name: m.config._attn_implementation for name, m in x.named_modules() if hasattr(m, "config")}
        for x in (model, kept)
    ]
    assert implementations[0] == implementations[1]


def test_equal_divergences_keep_the_first_layers():
    assert best([{"none": 3.0, "a": 2.0, "b": 1.0, "c": 2.0}], 2) == ["a", "b"]


def test_each_kind_of_text_counts_alike():
    text, repeated = (
        {"none": 1.0, "a": 0.5, "b": 0.9, "c": 1.0},
        {"none": 100.0, "a": 99.0, "b": 10.0, "c": 95.0},
    )
    assert best([text, repeated], 1) == ["b"] and best([text], 1) == ["a"]
    assert best([text, {name: 0.0 for name in text}], 1) == ["a"]  # a teacher that cannot copy tells nothing


@pytest.mark.parametrize(("rows", "length"), [(1, 5), (2, 6), (3, 7)])
def test_repeated_text_is_the_first_half_of_each_block_twice(rows, length):
    batches = [torch.arange(4 * length).view(4, length) + 100 * i for i in range(rows)]
    found = repeated([batches[0], *(Blocks(x) for x in batches[1:])])
    assert len(found) == (rows + 1) // 2
    for one, whole in zip(found, batches, strict=False):
        half = (length + 1) // 2
        assert torch.equal(one[:, :half], whole[:, :half])
        assert torch.equal(one[:, half:], whole[:, : length - half])


def test_layers_that_stay_softmax_anyway_do_not_count():
    layers = plan_layers(tiny_model("gemma3n"))  # two of six can be converted
    linear, softmax = choose_layers(layers, "auto:1")
    assert (len(linear), len(softmax)) == (2, 4)
    with pytest.raises(UserError, match="--keep-softmax auto:2: the model has 2 layers"):
        choose_layers(layers, "auto:2")


@pytest.mark.parametrize(
    "keep", ["auto:0", "auto:4", "auto:99", "auto:x", "auto:", "auto:1,2", "auto:-1", "auto"]
)
def test_bad_numbers_are_refused(keep, teacher):
    before = sorted(teacher.folder.iterdir())
    with pytest.raises(UserError, match=f"--keep-softmax {keep}: "):
        run(teacher, teacher.folder / "bad", keep_softmax=keep)
    assert sorted(teacher.folder.iterdir()) == before


def test_a_choice_needs_text(teacher):
    with pytest.raises(UserError, match="--keep-softmax auto:1: there is no text"):
        convert(teacher.path, teacher.folder / "bad", train=False, keep_softmax="auto:1")


def test_a_dry_run_tells_of_the_choice(teacher, capsys):
    arguments = ["convert", teacher.path, "--data", teacher.text, "--seq-len", "16", "--dry-run"]
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--keep-softmax", "auto:3"])
    assert not end.value.code
    assert (
        "kept as softmax: 3 of the linear layers, chosen by their distance from the teacher"
        in capsys.readouterr().out
    )


def test_the_terminal_shows_the_measurement(teacher, capsys):
    arguments = ["convert", teacher.path, "-o", str(teacher.folder / "shown"), "--eval-data", teacher.text]
    with pytest.raises(SystemExit) as end:
        main(
            [
                *arguments,
                "--seq-len",
                "16",
                "--no-train",
                "--keep-softmax",
                "auto:1",
                "-q",
                "--set",
                "attention.local.size=4",
            ]
        )
    assert not end.value.code
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    (kept,) = [row for row in rows if row[-1:] == ["kept"]]
    assert kept[0] in LAYERS and float(kept[1]) > 0
    assert sum(row[:1] == [name] for row in rows for name in [*LAYERS, "none"]) == 5
