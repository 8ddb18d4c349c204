"""The self-check of a conversion decodes from the first token on, alone and behind pads."""

import pytest
import torch
from families import AUGMENTED, swapped
from planted_faults import DECODING, GROUPS, LAYOUT, PREFILL, Fault, forget_layouts

from linearize_cli.errors import CheckFailed
from linearize_cli.metrics.selfcheck import (
    TOLERANCE,
    check_tokens,
    reload_difference,
    require_same,
    scale,
    self_check,
)
from linearize_cli.models.tasks import task_of

WIDE = {**AUGMENTED, "local": {"scope": "sliding", "size": 40, "score": "softmax"}, "sinks": 4}
SEPARATE = {**WIDE, "combine": "gate"}  # which has no fast form
WIDE_GROUPS = {**GROUPS, "local": {"scope": "group", "size": 40, "score": "relu2"}}
NEAR = "linearize_kernels.equation:Equation.near"
FAULTS = [
    Fault(
        "a window off by one in decoding",
        NEAR,
        "(i - j).abs() < self.size",
        "(i - j).abs() < self.size - (query_position.shape[-1] == 1)",
        "incremental",
        WIDE,
    ),
    Fault(
        "sinks that count twice in decoding",
        f"{LAYOUT}:laid_out",
        "recent = recent.masked_fill(recent < eq.sinks, -1)",
        "recent = recent.masked_fill(recent < 0, -1)",
        "incremental",
        WIDE,
    ),
    Fault(
        "an open group that is not folded by single tokens",
        f"{DECODING}:Decoding.fold_oldest",
        "max(self.counts) < begins:",
        "max(self.counts) < begins + 99:",
        "incremental",
        WIDE_GROUPS,
    ),
    Fault(
        "a conv tail that is lost once the window is full",
        f"{PREFILL}:after",
        "recent_v=last(None if state is None else state.recent_v, v),",
        "recent_v=last(None if state is None else state.recent_v * (count < eq.recent), v),",
        "incremental",
        WIDE,
    ),
    Fault(
        "sinks that a short row of a padded batch does not have yet",
        f"{LAYOUT}:behind",
        "torch.where(sinks < state.count[..., None], sinks, -1)",
        "torch.where(sinks <= state.count[..., None], sinks, -1)",
        "padded",
        WIDE,
    ),
    Fault(
        "a padded cache whose window is one token short",
        f"{LAYOUT}:behind",
        "recent = state.recent_position.masked_fill(state.recent_position < eq.sinks, -1)",
        "recent = state.recent_position.masked_fill(state.recent_position < eq.sinks + 1, -1)",
        "padded",
        SEPARATE,
    ),
]


@pytest.fixture(autouse=True)
def new_layouts():
    forget_layouts()
    yield
    forget_layouts()


def differences(model, tokenizer):
    with torch.inference_mode():
        task = task_of(model, tokenizer)
        ids = check_tokens(model, None)
        found, logits = self_check(task, model, ids)
        return {**found, "reload": reload_difference(task, model, ids, logits)}, logits


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("attention", [AUGMENTED, WIDE, GROUPS, WIDE_GROUPS])
def test_sound_models_pass(attention, keep, tokenizer):
    found, logits = differences(swapped("llama", attention, keep, num_hidden_layers=2), tokenizer)
    require_same(found, logits)
    assert max(found.values()) < TOLERANCE[logits.dtype] * scale(logits) / 4


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_faults_of_decoding_are_refused(fault, tokenizer, monkeypatch):
    model = swapped("llama", fault.attention, num_hidden_layers=2)
    fault.plant(monkeypatch)
    found, logits = differences(model, tokenizer)
    assert found[fault.check] > TOLERANCE[logits.dtype] * scale(logits)
    with pytest.raises(CheckFailed, match=fault.check):
        require_same(found, logits)
