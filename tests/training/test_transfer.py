"""Transfer with shorter windows: their schedule, what a shorter one means, and that the far part learns from it."""

import pytest
import torch
from convert_case import SMALL, losses, make_teacher, run, stopped
from encoders import swapped as swapped_encoder
from families import AUGMENTED, swapped
from linearize_kernels.ops import chunked
from safetensors.torch import load_file

from linearize_cli.artifact.load import load
from linearize_cli.errors import UserError
from linearize_cli.methods.registry import load_recipe
from linearize_cli.models.batch import Batch
from linearize_cli.runtime.dispatch import converted
from linearize_cli.training.attention_transfer import Transfer, WindowDropout, shorter_windows, transferring


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("transfer"))


def test_shorter_windows_become_rarer_and_end():
    steps = 4000
    windows = WindowDropout(0.8, steps, seed=3)
    shares = [windows.at(step) for step in range(steps)]
    for part in range(4):
        some = shares[part * steps // 4 : (part + 1) * steps // 4]
        expected = 0.8 * (1 - (part + 0.5) / 4)
        assert sum(share is not None for share in some) / len(some) == pytest.approx(expected, abs=0.05)
    drawn = sorted(share for share in shares if share is not None)
    assert 0 <= drawn[0] < 0.01 and 0.99 < drawn[-1] < 1
    assert drawn[len(drawn) // 2] == pytest.approx(0.5, abs=0.05)
    assert shares == [windows.at(step) for step in range(steps)]
    assert shares != [WindowDropout(0.8, steps, seed=4).at(step) for step in range(steps)]
    assert {WindowDropout(0.0, steps, seed=3).at(step) for step in range(steps)} == {None}


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_shorter_window_is_the_equation_of_that_window(share):
    """Compare with a conversion that has a window of that length and the same parameters."""
    model = swapped("llama")
    local = {**AUGMENTED["local"], "size": int(share * AUGMENTED["local"]["size"])}
    short = swapped("llama", {**AUGMENTED, "local": local})
    short.load_state_dict(model.state_dict())
    check_window(model, short, share, torch.randint(3, 99, (2, 41)))


def test_a_shorter_window_reads_a_position_bias_in_its_place():
    """T5's, of the encoder centred, of the decoder causal; its table is that of the longer window."""
    attention, share, size = {**AUGMENTED, "sinks": 0}, 0.4, 3
    model = swapped_encoder("t5", attention)
    short = swapped_encoder("t5", {**attention, "local": {**attention["local"], "size": size}})
    weights = model.state_dict()
    for name, part in converted(short).items():
        if part.linear_attention.distance_bias is not None:
            table = weights[f"{name}.linear_attention.distance_bias"]
            first = 0 if part.linear_attention.equation.causal else 8 - size
            width = part.linear_attention.distance_bias.shape[-1]
            weights[f"{name}.linear_attention.distance_bias"] = table[:, first : first + width]
    short.load_state_dict(weights)
    check_window(model, short, share, torch.randint(3, 80, (2, 41)))


@pytest.mark.parametrize("size", [8, 24])
def test_recomputed_segments_have_the_window_of_their_step(size, monkeypatch):
    """The backward of a step runs after its shorter window has ended."""
    local = {**AUGMENTED["local"], "size": size}
    model = swapped("llama", {**AUGMENTED, "local": local})
    batch = Batch({"input_ids": torch.randint(3, 99, (2, 61)), "use_cache": False}, None)
    found = []
    for stored in (1 << 30, 0):
        monkeypatch.setattr(chunked, "STORED", stored)
        objective = Transfer(model, "sdpa", WindowDropout(1.0, 1000, seed=0))
        objective.step = 0
        model.zero_grad()
        objective(batch)[0].backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and found[0]
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def check_window(model, short, share, ids):
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    long, expected = model(**inputs).logits, short(**inputs).logits
    with shorter_windows(model, share):
        found = model(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(model(**inputs).logits, long) and (found - long).abs().max() > 1e-3


def test_a_measurement_has_the_window_whole():
    model = swapped("llama")
    batch = Batch({"input_ids": torch.randint(3, 99, (2, 41)), "use_cache": False}, None)
    objective = Transfer(model, "sdpa", WindowDropout(1.0, 1000, seed=0))
    plain = Transfer(model, "sdpa")(batch)[0].item()
    assert objective(batch)[0].item() == plain
    objective.step = 0
    assert objective(batch)[0].item() != plain
    assert {m.linear_attention.equation.size for m in converted(model).values()} == {8}


def test_the_far_part_learns_what_the_window_hides(teacher):
    """With all windows as they are, what is near never teaches the far part; left alone, it then does worse."""
    errors = {}
    for dropout in (0, 1):
        output = teacher.folder / f"dropout-{dropout}"
        overrides = (*SMALL["overrides"], *options(dropout), "recover.transfer.lr=1e-2")
        run(teacher, output, tokens=16 * 4 * 100, overrides=overrides)
        model, _ = load(output)
        ids = torch.randint(3, model.config.vocab_size, (64, 16), generator=torch.Generator().manual_seed(0))
        batch = Batch({"input_ids": ids, "use_cache": False}, None)
        with torch.no_grad(), shorter_windows(model, 0.0), transferring(model, "sdpa") as losses:
            model(**batch.inputs)
        errors[dropout] = sum(losses.values()).item()
    assert errors[1] < 0.95 * errors[0], errors


def options(dropout, share=1):
    return f"recover.transfer.window_dropout={dropout}", f"recover.transfer.share={share}"


def test_a_resumed_run_has_the_same_windows(teacher, monkeypatch):
    overrides = (*SMALL["overrides"], *options(0.9, 0.6))
    run(teacher, teacher.folder / "whole", overrides=overrides)
    with stopped(monkeypatch, lambda checkpoint, saves: saves == 7):
        run(teacher, teacher.folder / "stopped", overrides=overrides)
    run(teacher, teacher.folder / "stopped", overrides=overrides, resume=True)
    assert losses(teacher.folder / "stopped") == losses(teacher.folder / "whole")
    weights = [load_file(teacher.folder / name / "model.safetensors") for name in ("stopped", "whole")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


@pytest.mark.parametrize("method", ["window", "based"])
def test_dropout_needs_a_window_and_a_far_part(method):
    with pytest.raises(UserError, match="window_dropout"):
        load_recipe(method, ["recover.transfer.window_dropout=0.5"])
