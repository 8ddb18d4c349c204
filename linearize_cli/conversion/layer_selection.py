"""Selection of the layers to convert. They are found by a probe of the model's attention calls, not by their
names.
"""

from typing import Any

import torch
import transformers
from linearize_kernels.parts.local_scores import SCORES
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)

from linearize_cli.conversion.attention_probe import (
    PROBE,
    Call,
    has_bias,
    is_causal,
    is_cross,
    probe,
    probe_bias,
    visible,
)
from linearize_cli.errors import UserError
from linearize_cli.methods.recipe import Recipe
from linearize_cli.models.layer import Layer
from linearize_cli.models.tasks import task_class
from linearize_cli.runtime.adapt import adapted
from linearize_cli.runtime.adapters import Indexed
from linearize_cli.training.job import Job

# Cache layers that a converted layer's own can replace (see `runtime.places.cache_layer`).
CACHE_LAYERS = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)
AUTO = "auto:"


def plan_layers(model: PreTrainedModel, reach: int = 64, cross: bool = False) -> list[Layer]:
    """Return all attention modules that the model's forward calls, in order, with the reason if one cannot be
    converted.

    Args:
        reach: the number of distances at which a position bias is read: the size of the local window.
        cross: True to convert cross-attention.

    Raises:
        UserError: the model's code is not part of transformers, or no layer calls transformers' attention
            interface.
    """
    kind = type(model).__name__
    if getattr(transformers, kind, None) is not type(model):
        raise UserError(
            f"{kind} is not a class of transformers, and an artifact cannot carry another repository's code",
            "Choose a checkpoint whose model type is part of transformers.",
        )
    with adapted(model):
        calls = probe(model)
        biases = probe_bias(model, calls, reach)
        if not calls:
            found = sorted(
                {type(m).__name__ for m in model.modules() if "attention" in type(m).__name__.lower()}
            )
            raise UserError(
                f"{kind} cannot be converted: no layer calls transformers' attention interface"
                + (
                    f" (its own code computes {', '.join(found)})"
                    if found
                    else " (it has no softmax attention)"
                ),
                "`linearize inspect MODEL` shows which layers of a model can be converted.",
            )
        names = {module: name for name, module in model.named_modules()}
        decoder = model.get_decoder() if model.config.is_encoder_decoder else model
        cache, encodes = DynamicCache(config=decoder.config), task_class(model).encodes
        return [
            Layer(
                names[module],
                geometry(module, call) | ({"bias": True} if module in biases else {}),
                refusal(module, call, cache, biases.get(module), encodes, cross),
                biases.get(module),
                is_causal(module, call) and not is_cross(call),
            )
            for module, call in calls.items()
        ]


def geometry(module: nn.Module, call: Call) -> dict[str, Any]:
    """Return the sizes of an attention layer (heads, head sizes, ...), as keyword arguments of
    `runtime.layer.equation`.
    """
    scale = call.extra.get("scaling")
    softcap = call.extra.get("softcap")
    sides = {"cross": True} if is_cross(call) else {} if is_causal(module, call) else {"causal": False}
    return {
        "heads": call.query[1],
        "kv_heads": call.key[1],
        "key_dim": call.query[3],
        "value_dim": call.value[3],
        "scale": float(call.query[3] ** -0.5 if scale is None else scale),
        "softcap": None if softcap is None else float(softcap),
        **sides,
    }


def refusal(
    module: nn.Module,
    call: Call,
    cache: DynamicCache,
    bias: torch.Tensor | None,
    encodes: bool,
    cross: bool,
) -> str | None:
    """Return the reason why a layer cannot be converted, or None if it can.

    Args:
        call: the recorded attention call of the module.
        cache: an empty cache of the model, whose layers show what they store.
        bias: the module's position bias by distance. None if it has no bias, or one that also depends on
            other things.
        encodes: True if bidirectional layers can be converted.
        cross: True if cross-attention can be converted.
    """
    if is_cross(call) and not cross:
        return "cross-attention: its keys come from another sequence"
    if not is_cross(call) and not is_causal(module, call) and not (encodes and sees_all(call)):
        return "its attention is not causal"
    if has_bias(module, call) and bias is None:
        return "it adds a bias to its scores that is not a function of distance alone"
    if not is_cross(call) and not is_causal(module, call):
        return None  # it does not decode, so it needs no state
    if call.count > 1:
        return f"it calls attention {call.count} times in one forward"
    if call.extra.get("linearize_state") != PROBE:
        return "it takes no cache, returns no cache or drops keyword arguments, so it cannot receive a state"
    if not isinstance(getattr(module, "layer_idx", None), int) or module.layer_idx < 0:
        return "it has no layer_idx, so it has no place in a cache"
    if getattr(module, "is_kv_shared_layer", False) or getattr(module, "store_full_length_kv", False):
        return "it shares keys and values with other layers"
    place = cache.layers[module.layer_idx] if module.layer_idx < len(cache.layers) else None
    indexed = isinstance(module, Indexed) and type(place) is DynamicIndexedLayer
    if type(place) not in CACHE_LAYERS and not indexed:
        return "its cache holds more than keys and values (an index or compressed keys, say)"
    return None


def sees_all(call: Call) -> bool:
    """Return True if every token of the probe attends to all tokens."""
    return call.mask is None or bool(visible(call.mask[0, 0]).all())


@torch.no_grad()
def copy_biases(model: PreTrainedModel, layers: list[Layer]) -> None:
    """Copy the base model's position biases into the layers of a linearized model.

    Only layers with softmax scores in their local part get them.
    """
    for layer in layers:
        attention = model.get_submodule(layer.name).linear_attention
        if (
            layer.bias is not None
            and attention.distance_bias is not None
            and attention.score is SCORES["softmax"]
        ):
            width = attention.distance_bias.shape[1]
            first = 0 if layer.causal else (layer.bias.shape[1] - width) // 2
            attention.distance_bias.copy_(layer.bias[:, first : first + width])


def chosen_layers(job: Job, model: PreTrainedModel) -> tuple[list[Layer], list[Layer]]:
    """Return the layers that become linear, and those that stay softmax.

    Raises:
        UserError: no layer can be converted, `--keep-softmax` is invalid, or a softmax layer needs the
            position biases of a converted one.
    """
    attention = job.recipe.attention
    reach = attention.local.size if attention.local else 1
    linear, softmax = choose_layers(plan_layers(model, reach, attention.cross == "linear"), job.keep_softmax)
    check_biases(model, linear, softmax, job.keep_softmax)
    return linear, softmax


def choose_layers(layers: list[Layer], keep: str | None = None) -> tuple[list[Layer], list[Layer]]:
    """Split the layers into those to convert and those that stay softmax.

    Args:
        keep: the argument of `--keep-softmax`, which keeps more layers softmax: `N` (evenly spread) or
            `at:i,j,k` (indices from 0). The layers of `auto:N` are chosen later, so all count as linear here.

    Returns:
        the layers to convert and the layers that stay softmax.

    Raises:
        UserError: no layer can be converted, or `keep` names a layer that does not exist.
    """
    linear = [layer for layer in layers if layer.refusal is None]
    if not linear:
        reasons = "\n".join(f"  {layer.name}: {layer.refusal}" for layer in layers[:8])
        more = "" if len(layers) <= 8 else f"\n  and {len(layers) - 8} more"
        raise UserError(f"no layer of this model can be converted:\n{reasons}{more}")
    kept = {linear[i].name for i in kept_indices(keep, len(linear))} if keep else set()
    linear = [layer for layer in linear if layer.name not in kept]
    names = {layer.name for layer in linear}
    return linear, [layer for layer in layers if layer.name not in names]


def measured_count(keep: str | None) -> int:
    """Return N if `--keep-softmax` is `auto:N` (N layers chosen by measured KL), else 0."""
    return int(keep.removeprefix(AUTO)) if keep and keep.startswith(AUTO) else 0


def check_biases(model: PreTrainedModel, linear: list[Layer], softmax: list[Layer], keep: str | None) -> None:
    """Check that no softmax layer takes its position biases from a converted one.

    In T5 a decoder's first layer computes the position biases for all layers, for as many tokens as its cache
    has keys. A converted layer's cache has no keys.

    Args:
        linear, softmax: the layers that become linear, and those that stay softmax.
        keep: the argument of `--keep-softmax`. With `auto:N`, any layer may stay softmax.

    Raises:
        UserError: a layer that stays softmax, or may with `auto:N`, takes its biases from a converted layer.
    """

    def makes_bias(layer: Layer) -> bool | None:
        return getattr(model.get_submodule(layer.name), "has_relative_attention_bias", None)

    makers = [layer.name for layer in linear if layer.causal and makes_bias(layer)]
    kept = softmax + (linear if measured_count(keep) else [])
    takers = [layer.name for layer in kept if layer.caches and makes_bias(layer) is False]
    if makers and takers:
        raise UserError(
            f"{takers[0]} cannot stay softmax: its position biases come from {makers[0]}",
            "Keep that one too, with --keep-softmax at:..., or keep no layer of the decoder.",
        )


def kept_indices(keep: str, count: int) -> list[int]:
    """Return the indices of the layers that `--keep-softmax` keeps, among `count` layers that can be
    converted.

    `2` of 8 layers gives 2 and 6. `at:0,3` gives 0 and 3. `auto:2` gives an empty list, because its layers
    are chosen later.

    Raises:
        UserError: `keep` is invalid.
    """
    kind, _, rest = keep.rpartition(":")
    try:
        numbers = [int(part) for part in rest.split(",")]
    except ValueError:
        numbers = []
    if kind == "at" and numbers and all(0 <= i < count for i in numbers) and len(set(numbers)) < count:
        return numbers
    if kind == "" and len(numbers) == 1 and 0 <= numbers[0] < count:
        return [(2 * i + 1) * count // (2 * numbers[0]) for i in range(numbers[0])]
    if kind + ":" == AUTO and len(numbers) == 1 and 0 < numbers[0] < count:
        return []
    raise UserError(
        f"--keep-softmax {keep}: the model has {count} layers that can be converted",
        f"Use N (evenly spread) or auto:N (chosen by measurement) with N below {count}, or at:i,j,k with indices "
        f"from 0 to {count - 1}.",
    )


def conversion_record(
    model: PreTrainedModel, recipe: Recipe, linear: list[Layer], softmax: list[Layer]
) -> dict[str, Any]:
    """Return the `linearize` part of a linearized config, from which its layers can be built again."""
    return {
        "base_class": type(model).__name__,
        "base_model_type": model.config.model_type,
        "method": recipe.name,
        "attention": recipe.to_dict()["attention"],
        "layers": {layer.name: layer.geometry for layer in linear},
        "softmax": [layer.name for layer in softmax],
    }
