"""The layers that can be converted, and the reasons for the others."""

import copy

import pytest
import torch
import transformers
from families import REFUSED, tiny_model

from linearize_cli.conversion.layer_selection import choose_layers, plan_layers
from linearize_cli.errors import UserError

SHARED_KV = "it shares keys and values with other layers"
NOT_OF_DISTANCE = "it adds a bias to its scores that is not a function of distance alone"
REASONS = {
    "bert-encoder": "layer.0.attention.self: its attention is not causal",
    "doge": NOT_OF_DISTANCE,
    "inkling": NOT_OF_DISTANCE,
    "zamba2": "it has no layer_idx, so it has no place in a cache",
    "mamba": r"MambaForCausalLM .*it has no softmax attention",
}
IDS = torch.arange(3, 33)[None]


@pytest.mark.parametrize("family", ["llama", "gemma3n", "qwen3-next", "gpt-oss"])
def test_plan_leaves_the_model_as_it_was(family):
    model = tiny_model(family)
    configs = {name: m.config for name, m in model.named_modules() if hasattr(m, "config")}
    before = {name: copy.deepcopy(vars(config)) for name, config in configs.items()}
    interfaces = set(transformers.AttentionInterface._global_mapping)
    masks = set(transformers.AttentionMaskInterface._global_mapping)
    logits = model(IDS).logits
    plan_layers(model.train())
    assert model.training
    for name, config in configs.items():
        assert model.get_submodule(name).config is config and vars(config) == before[name], name
    assert set(transformers.AttentionInterface._global_mapping) == interfaces
    assert set(transformers.AttentionMaskInterface._global_mapping) == masks
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert torch.equal(model.eval()(IDS).logits, logits)


@pytest.mark.parametrize("family", ["gemma3n", "gemma4"])
def test_layers_that_share_keys_stay_softmax(family):
    layers = plan_layers(tiny_model(family))
    assert [layer.refusal for layer in layers] == [None, None] + 4 * [SHARED_KV]


def test_native_linear_layers_are_left_alone():
    linear, softmax = choose_layers(plan_layers(tiny_model("qwen3-next")))
    assert [layer.name for layer in linear] == ["model.layers.1.self_attn", "model.layers.3.self_attn"]
    assert softmax == []


@pytest.mark.parametrize("family", REFUSED)
def test_refusals_say_why(family):
    with pytest.raises(UserError, match=REASONS[family]):
        choose_layers(plan_layers(tiny_model(family)))


def test_models_of_another_kind_are_refused():
    class OwnLlama(transformers.LlamaForCausalLM):
        pass

    with pytest.raises(UserError, match="OwnLlama is not a class of transformers"):
        plan_layers(OwnLlama(tiny_model("llama").config))
