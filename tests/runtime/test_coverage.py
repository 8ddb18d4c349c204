"""All causal model types of transformers: none is converted to something that disagrees with itself."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from walk import TYPES, walk

from linearize_cli.conversion.layer_selection import choose_layers, plan_layers
from linearize_cli.conversion.phantom import Phantom
from linearize_cli.errors import UserError
from linearize_cli.models.positions import context_length, last_position
from linearize_cli.models.task import config_value

SAMPLE = TYPES[::12]


@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_sample_of_types(model_type):
    outcome = walk(model_type)
    assert outcome.outcome != "failed", outcome.detail


def test_a_wrong_conversion_fails_the_walk(monkeypatch):
    monkeypatch.setattr("linearize_cli.runtime.layer.valid_tokens", lambda *arguments: None)
    outcome = walk("llama")
    assert outcome.outcome == "failed" and "behind pads" in outcome.detail


def default_outcome(model_type: str) -> str:
    """Plan a model type with its default config, on the meta device: return the class, or a refusal.

    transformers itself cannot build some types with their defaults.
    """
    try:
        with torch.device("meta"):
            config = CONFIG_MAPPING[model_type]()
            model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    except Exception as error:
        return f"not built: {error}"
    try:
        with Phantom():
            choose_layers(plan_layers(model))
    except UserError as error:
        return f"refused: {error}"
    context_length(model), last_position(model)
    config_value(model.config, "pad_token_id"), config_value(model.config, "decoder_start_token_id")
    config.get_text_config().hidden_size, config.get_text_config().vocab_size
    return type(model).__name__


@pytest.mark.parametrize(
    ("model_type", "outcome"),
    [
        ("codegen", "CodeGenForCausalLM"),
        ("gemma3", "Gemma3ForConditionalGeneration"),
        ("mllama", "MllamaForCausalLM"),
        ("blenderbot", "refused: BlenderbotForCausalLM cannot be converted: it does not run"),
        ("blt", "refused: BltForCausalLM cannot be converted: it does not run"),
        ("xmod", "refused: XmodForCausalLM cannot be converted: it does not run on tokens alone"),
    ],
)
def test_a_type_with_its_default_config(model_type, outcome):
    assert default_outcome(model_type).startswith(outcome)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TYPES)
def test_every_type_with_its_default_config(model_type):
    assert default_outcome(model_type)


def test_token_ids_are_found_wherever_a_config_has_them():
    names = ("codegen", "gemma3", "gemma3n", "gemma4", "llama4", "mllama", "qwen3_5")
    configs = {name: CONFIG_MAPPING[name]() for name in names}
    assert not any(hasattr(config, "pad_token_id") for config in configs.values())
    for config in configs.values():
        text = getattr(config.get_text_config(), "pad_token_id", None)
        assert config_value(config, "pad_token_id") == text
    configs["gemma3"].pad_token_id = 7
    assert config_value(configs["gemma3"], "pad_token_id") == 7


@pytest.mark.slow
def test_the_whole_walk():
    outcomes = [walk(model_type) for model_type in TYPES]
    assert not [outcome for outcome in outcomes if outcome.outcome == "failed"]
    converted = [outcome.model_type for outcome in outcomes if outcome.outcome == "converted"]
    refused = [outcome.model_type for outcome in outcomes if outcome.outcome == "refused"]
    assert len(converted) >= 140
    assert len(converted) >= 0.9 * len(converted + refused), refused
