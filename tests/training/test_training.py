"""The keys of a recipe about training: rates, warmup, clipping, evaluation on held-out text, full fine-tuning."""

import json
import math

import pytest
import torch
from convert_case import SMALL, losses, make_teacher, run, stopped
from families import swapped
from safetensors.torch import load_file
from torch import nn

from linearize_cli import load
from linearize_cli.errors import UserError
from linearize_cli.methods.recipe import Distill, Lora
from linearize_cli.methods.registry import load_recipe
from linearize_cli.models.batch import Batch
from linearize_cli.training import loop as training
from linearize_cli.training.distillation import Distillation
from linearize_cli.training.micro_batches import MicroBatches
from linearize_cli.training.objective import Best
from linearize_cli.training.student import add_lora


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module")
def plain(teacher):
    run(teacher, teacher.folder / "plain")
    return teacher.folder / "plain"


def convert(teacher, name, *options, **changes):
    output = teacher.folder / name
    return output, run(teacher, output, overrides=(*SMALL["overrides"], *options), **changes)


def records(output):
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def weights(output):
    return load_file(output / "model.safetensors")


@pytest.mark.parametrize(
    "option",
    [
        "recover.distill.warmup=0.1",
        "recover.distill.clip=1",
        "recover.distill.lora.targets=all",
        "recover.distill.linear_lr=auto",
        "recover.transfer.window_dropout=0",
        "recover.distill.evaluate=0",
    ],
)
def test_a_default_that_is_spelled_out_changes_nothing(option, teacher, plain):
    output, _ = convert(teacher, option.replace(".", "-"), option)
    found, expected = weights(output), weights(plain)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_checkpointing_changes_no_weight(teacher, plain):
    output, _ = convert(teacher, "checkpointing", "recover.distill.checkpointing=true")
    assert losses(output) == losses(plain)
    found, expected = weights(output), weights(plain)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_linear_parts_have_their_own_rate():
    objective = Distillation(add_lora(swapped("llama"), Lora()), "sdpa", Distill())
    groups = training.by_rate(objective, 1e-3, 5e-3)
    assert all("linear_attention" in name for name in groups[5e-3])
    assert all("lora_" in name for name in groups[1e-3])
    assert set(groups[1e-3]) | set(groups[5e-3]) == set(training.trainable(objective))
    assert list(training.by_rate(objective, 1e-3, None)) == [1e-3]


def test_a_rate_of_the_linear_parts_moves_them_alone(teacher, plain):
    """One step of distillation: AdamW's first step is as long as the rate, whatever the gradient."""
    moves = {}
    options = ("recover.transfer.share=0", "recover.distill.lr=1e-3", "recover.distill.linear_lr=1e-5")
    for name, change in (
        ("own", options),
        ("same", (*options[:2], "recover.distill.linear_lr=null")),
        ("none", ("recover.distill.lr=1e-30", options[0])),
    ):
        moves[name] = weights(convert(teacher, f"rate-{name}", *change, tokens=16 * 4)[0])
    for name, start in moves["none"].items():
        own, same = ((moves[kind][name] - start).abs().max().item() for kind in ("own", "same"))
        if "linear_attention" in name and same > 1e-6:
            assert own == pytest.approx(1e-5, rel=0.05) and same == pytest.approx(1e-3, rel=0.05)
        else:
            assert own == pytest.approx(same, abs=1e-7)


def test_warmup_is_a_share_of_the_steps(teacher):
    output, _ = convert(teacher, "warmup", "recover.distill.warmup=0.5", "recover.distill.lr=1e-3")
    rates = [r["lr"] for r in records(output) if r["stage"] == "distill"]
    cosine = [0.5e-3 * (1 + math.cos(math.pi * i / 6)) for i in range(6)]
    assert rates == pytest.approx([1e-3 * (i + 1) / 6 for i in range(6)] + cosine)


class Valley(nn.Module):
    """Its loss is the distance of its weight from 3."""

    def __init__(self):
        super().__init__()
        self.weight, self.step = nn.Parameter(torch.zeros(1)), 0

    def forward(self, batch):
        assert self.step is None and not torch.is_grad_enabled()
        return (self.weight - 3).abs().sum() + batch.inputs["x"].sum(), {}


def held_out(*values):
    return [Batch({"x": torch.tensor([value])}, None) for value in values]


def test_the_best_parameters_are_kept_and_the_stage_ends():
    objective, record = Valley(), {}
    options = Distill(evaluate=0.1, early_stop=2)
    best = Best(
        objective,
        dict(objective.named_parameters()),
        lambda: held_out(0.0, 1.0),
        20,
        options,
        record,
        MicroBatches(),
    )
    seen = {}
    for step in range(1, 21):
        objective.weight.data.fill_(step)
        if found := best.evaluate(step):
            seen[step] = found["held_out"]
        if best.stopped:
            break
    assert seen == {2: 1.5, 4: 1.5, 6: 3.5}  # the first of equals is the best
    best.restore()
    assert objective.weight.item() == 2 and record["step"] == 2
    again = Best(
        objective,
        dict(objective.named_parameters()),
        lambda: held_out(0.0),
        20,
        options,
        record,
        MicroBatches(),
    )
    assert again.stopped  # a resumed run does not go on


def test_the_last_step_is_evaluated_too():
    objective = Valley()
    named, options = dict(objective.named_parameters()), Distill(evaluate=0.4)
    best = Best(objective, named, lambda: held_out(0.0), 7, options, {}, MicroBatches())
    evaluated = [step for step in range(1, 8) if best.evaluate(step)]
    assert evaluated == [3, 6, 7]


def test_a_run_keeps_the_best_of_its_evaluations(teacher, monkeypatch):
    """A rate at which distillation gets worse: the best is not the last, the stage ends early, and what is saved is
    the best; a run that is stopped goes on to the same.
    """
    options = (
        "recover.distill.lr=7",
        "recover.distill.evaluate=0.08",
        "recover.distill.early_stop=3",
        "recover.transfer.evaluate=0.5",
    )
    output, report = convert(teacher, "best", *options, tokens=16 * 4 * 60)
    losses = {
        r["step"]: r["held_out"] for r in records(output) if r["stage"] == "distill" and "held_out" in r
    }
    best = min(losses, key=losses.get)
    assert list(losses)[-1] == best + 3 * 3 < 36, "the stage did not end early"
    assert report["tokens"] == {"transfer": 24 * 64, "distill": (best + 9) * 64}
    model, _ = load(output)
    assert all(p.isfinite().all() for p in model.parameters())

    with stopped(monkeypatch, lambda checkpoint, saves: saves == 24 + 1 + best + 4):
        convert(teacher, "best-stopped", *options, tokens=16 * 4 * 60)
    again, resumed = convert(teacher, "best-stopped", *options, tokens=16 * 4 * 60, resume=True)
    assert resumed["tokens"] == report["tokens"] and resumed["perplexity"] == report["perplexity"]
    found, expected = weights(again), weights(output)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_fine_tuning_converts_and_resumes(dtype, teacher, monkeypatch):
    options = ("recover.distill.lora=null", "recover.distill.lr=3e-3", "recover.distill.checkpointing=true")
    changes = dict(tokens=16 * 4 * 60, dtype=dtype)
    output, report = convert(teacher, f"full-{dtype}", *options, **changes)
    loss = [value for (stage, _), value in losses(output).items() if stage == "distill"]
    assert all(map(math.isfinite, loss)) and sum(loss[-10:]) < 0.9 * sum(loss[:10])
    saved = weights(output)
    assert not [name for name in saved if "original" in name or "parametrizations" in name]
    original = load_file(f"{teacher.path}/model.safetensors")
    kept = {name for name in original if torch.equal(saved[name], original[name].to(saved[name].dtype))}
    assert kept == {"model.embed_tokens.weight", "lm_head.weight"} & set(original)

    with stopped(
        monkeypatch, lambda checkpoint, saves: (checkpoint.stage, checkpoint.step) == ("distill", 9)
    ):
        convert(teacher, f"full-stopped-{dtype}", *options, **changes)
    again, _ = convert(teacher, f"full-stopped-{dtype}", *options, **changes, resume=True)
    assert losses(again) == losses(output)
    found = weights(again)
    assert all(torch.equal(found[name], saved[name]) for name in saved)


def test_training_in_bfloat16_lowers_the_losses(teacher):
    options = ("recover.transfer.window_dropout=0.5",)
    output, _ = convert(teacher, "bf16", *options, dtype="bfloat16", tokens=16 * 4 * 150)
    loss = losses(output)
    assert all(map(math.isfinite, loss.values()))
    for stage, steps in (("transfer", 60), ("distill", 90)):
        first, last = ([loss[stage, i] for i in part] for part in (range(1, 11), range(steps - 9, steps + 1)))
        assert sum(last) < 0.95 * sum(first), stage
    dtypes = {name: value.dtype for name, value in weights(output).items()}
    assert {d for name, d in dtypes.items() if "linear_attention" in name} == {torch.float32}
    assert {d for name, d in dtypes.items() if "linear_attention" not in name} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("recover.distill.lora.targets=mlp", ["recover.distill.lora.targets", "'attention' or 'all'"]),
        ("recover.distill.linear_lr=0", ["recover.distill.linear_lr"]),
        ("recover.distill.warmup=2", ["recover.distill.warmup"]),
        ("recover.transfer.warmup=-1", ["recover.transfer.warmup"]),
        ("recover.distill.clip=0", ["recover.distill.clip", "null"]),
        ("recover.distill.evaluate=5", ["recover.distill.evaluate"]),
        ("recover.distill.early_stop=2", ["recover.distill.early_stop", "recover.distill.evaluate"]),
        ("recover.transfer.early_stop=0", ["recover.transfer.early_stop"]),
        ("recover.transfer.window_dropout=1.5", ["recover.transfer.window_dropout"]),
        ("recover.distill.checkpointing=3", ["recover.distill.checkpointing", "bool"]),
        ("recover.transfer.linear_lr=1", ["recover.transfer.linear_lr", "unknown"]),
    ],
)
def test_misfits_are_refused_with_their_keys(override, words):
    with pytest.raises(UserError) as error:
        load_recipe("augmented", [override])
    assert all(word in str(error.value) for word in words)


def test_full_fine_tuning_has_no_adapter_to_keep(teacher):
    with pytest.raises(UserError, match="keep-adapter"):
        convert(teacher, "no-adapter", "recover.distill.lora=null", keep_adapter=True)
    assert not (teacher.folder / "no-adapter").exists()
