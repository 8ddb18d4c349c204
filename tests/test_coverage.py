"""Of all causal model types of transformers: none is converted to something that disagrees with itself."""

import pytest
from walk import TYPES, walk

SAMPLE = TYPES[::12]


@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_sample_of_types(model_type):
    outcome = walk(model_type)
    assert outcome.outcome != "failed", outcome.detail


def test_a_wrong_conversion_fails_the_walk(monkeypatch):
    monkeypatch.setattr("linearize_cli.runtime.layer.valid_tokens", lambda *arguments: None)
    outcome = walk("llama")
    assert outcome.outcome == "failed" and "behind pads" in outcome.detail


@pytest.mark.slow
def test_the_whole_walk():
    outcomes = [walk(model_type) for model_type in TYPES]
    assert not [outcome for outcome in outcomes if outcome.outcome == "failed"]
    converted = [outcome.model_type for outcome in outcomes if outcome.outcome == "converted"]
    refused = [outcome.model_type for outcome in outcomes if outcome.outcome == "refused"]
    assert len(converted) >= 140
    assert len(converted) >= 0.9 * len(converted + refused), refused
