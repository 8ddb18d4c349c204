"""Decays set from the teacher's attention."""

import pytest
import torch
from convert_case import make_teacher, run

from linearize_cli import load
from linearize_cli.training.calibration import RATES, decaying, log_likelihood

STEP = (RATES[1] / RATES[0]).item()  # between two rates to choose from


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("calibration"))


def geometric(rate, length):
    """Causal attention weights `[length, length]` that fall by a factor of e^-rate a token."""
    position = torch.arange(length, dtype=torch.float64)
    distance = position[:, None] - position
    weights = torch.exp(-rate * distance).masked_fill(distance < 0, 0.0)
    return weights / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize("window, sinks", [(0, 0), (7, 0), (64, 5)])
@pytest.mark.parametrize("rate", [1e-5, 3e-3, 0.02, 0.3])
def test_the_decay_of_geometric_attention_is_found(rate, window, sinks):
    weights = torch.stack([geometric(rate, 251), geometric(0.05, 251)])
    found = RATES[log_likelihood(weights[None], window, sinks).argmax(-1)]
    if window < 64 or rate < 0.3:  # at this distance nothing is left of the last
        assert found[0].item() == pytest.approx(rate, rel=STEP - 1)
    assert found[1].item() == pytest.approx(0.05, rel=STEP - 1)


def test_the_likelihood_is_the_formula_s():
    weights = torch.rand(2, 3, 12, 12, dtype=torch.float64).tril()
    window, sinks = 3, 2
    expected = torch.zeros(3, len(RATES), dtype=torch.float64)
    for i in range(12):
        seen = [j for j in range(sinks, 12) if i - j >= window]
        for j in seen:
            kernel = torch.stack([torch.exp(-RATES * (i - m)) for m in seen]).sum(0)
            expected += weights[:, :, i, j].sum(0)[:, None] * (-RATES * (i - j) - kernel.log())
    torch.testing.assert_close(log_likelihood(weights, window, sinks), expected)


@pytest.mark.parametrize("method", ["retention", "augmented:mamba2", "augmented:gated-delta", "gla", "kda"])
def test_a_conversion_calibrates_its_decays(teacher, method):
    decays = {}
    for calibrated in ("true", "false"):
        output = teacher.folder / f"{method.replace(':', '-')}-{calibrated}"
        window = ["attention.local.size=4"] if method.startswith("augmented") else []
        changes = (*window, f"recover.transfer.calibrate={calibrated}")
        run(teacher, output, method=method, overrides=changes, train=False)
        model, _ = load(output)
        decays[calibrated] = [memory.decay_bias for memory in decaying(model).values()]
        assert len(decays[calibrated]) == 2
    for found, start in zip(*decays.values(), strict=True):
        rates = torch.nn.functional.softplus(found.double())
        assert not torch.equal(found, start)
        assert all((RATES - rate).abs().min() < 1e-5 * (1 + rate) for rate in rates.flatten())


def test_a_method_that_forgets_nothing_has_no_decays(teacher):
    run(teacher, teacher.folder / "sums", overrides=("attention.local.size=4",), train=False)
    assert decaying(load(teacher.folder / "sums")[0]) == {}
