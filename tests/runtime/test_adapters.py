"""Attention that computes its own softmax: what transfer aims at is that softmax, and the model stays itself."""

import pickle

import pytest
import torch
import transformers
from families import CONVERTED, swap, swapped, tiny_model
from forms import close, padded_tokens, tokens

from linearize_cli.conversion.layer_selection import plan_layers
from linearize_cli.runtime.adapters import ADAPTERS
from linearize_cli.runtime.dispatch import converted
from linearize_cli.training.attention_transfer import transferring

PACKAGES = {key.partition(".")[0] for key in ADAPTERS}
ADAPTED = [name for name, (kind, _) in CONVERTED.items() if kind.replace("-", "_") in PACKAGES]
LOCAL = {"local": {"scope": "sliding", "size": 4, "score": "softmax"}, "combine": "shared"}


@pytest.mark.parametrize("family", ADAPTED)
def test_transfer_aims_at_the_softmax_of_the_module_itself(family):
    """With every layer's target in place of its output, the model is the base model, pads included."""
    model, (ids, mask) = tiny_model(family), padded_tokens()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
        base = model(ids, attention_mask=mask, use_cache=False).logits
    native = model.config._attn_implementation
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    swap(model, LOCAL)
    model.load_state_dict(before, strict=False)
    with transferring(model, native) as losses:
        targets = model(ids, attention_mask=mask, use_cache=False).logits
        assert set(losses) == set(converted(model)) and all(loss > 1e-6 for loss in losses.values())
    close(targets[mask > 0], base[mask > 0])


@pytest.mark.parametrize("family", ADAPTED)
def test_the_plan_leaves_classes_and_logits_alone(family):
    model, ids = tiny_model(family), tokens()
    classes = [(type(module), "config" in vars(module)) for module in model.modules()]
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
        plan_layers(model)
        assert [(type(module), "config" in vars(module)) for module in model.modules()] == classes
        assert torch.equal(model(ids, use_cache=False).logits, logits)


def test_adapted_classes_are_of_one_model_and_pickle():
    model = swapped("bloom")
    attention = next(iter(converted(model).values()))
    plain = transformers.models.bloom.modeling_bloom.BloomAttention
    assert type(attention) is not plain and isinstance(attention, plain)
    assert type(next(m for m in tiny_model("bloom").modules() if isinstance(m, plain))) is plain
    assert pickle.loads(pickle.dumps(type(attention))) is type(attention)


@pytest.mark.parametrize(
    ("family", "slope"), [("bloom", 2**-2), ("mpt", 2**-2), ("falcon-alibi", 2**-2 / 8**0.5)]
)
def test_alibi_is_read_as_a_function_of_distance(family, slope):
    """ALiBi with 4 heads (arXiv 2108.12409): slopes 2^-2, 2^-4, ...; Falcon scales it like its scores."""
    layers = plan_layers(tiny_model(family), reach=40)
    distance = torch.arange(40.0)
    expected = torch.stack([-slope * 4.0**-head * distance for head in range(4)])
    for layer in layers:
        assert layer.refusal is None and layer.geometry["bias"] is True
        torch.testing.assert_close(layer.bias, expected, atol=1e-5, rtol=1e-5)
