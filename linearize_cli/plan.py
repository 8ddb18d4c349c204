"""Which layers of a model can be converted, and why not the others: found by a probe, not by name."""

from dataclasses import dataclass, field
from inspect import Parameter, signature
from typing import Any

import torch
import transformers
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from linearize_cli.errors import UserError
from linearize_cli.runtime.dispatch import find_cache

PROBE = "linearize_probe"
AUTO = "auto:"


@dataclass(frozen=True)
class Layer:
    """One attention module: its geometry (see `runtime.layer.equation`) and why it must stay softmax."""

    name: str
    geometry: dict[str, Any]
    refusal: str | None = None


@dataclass
class Call:
    """What one module gave to the attention interface during the probe."""

    query: torch.Size
    key: torch.Size
    value: torch.Size
    mask: torch.Tensor | None
    extra: dict[str, Any]
    count: int = 1


@dataclass
class Probe:
    """An attention function that records its calls and attends to nothing."""

    calls: dict[nn.Module, Call] = field(default_factory=dict)

    def __call__(self, module, query, key, value, attention_mask, **extra):
        count = self.calls[module].count + 1 if module in self.calls else 1
        self.calls[module] = Call(query.shape, key.shape, value.shape, attention_mask, extra, count)
        return value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None


def plan_layers(model: PreTrainedModel) -> list[Layer]:
    """Every attention module that the model's forward reaches, in order.

    Raises:
        UserError: the model's code is not transformers' own, it is an encoder-decoder, or none of its layers
            dispatches its attention.
    """
    kind = type(model).__name__
    if getattr(transformers, kind, None) is not type(model):
        raise UserError(
            f"{kind} is not a class of transformers, and an artifact cannot carry another repository's code",
            "Choose a checkpoint whose model type transformers knows itself.",
        )
    if model.config.is_encoder_decoder:
        raise UserError(
            f"{kind} is an encoder-decoder; only decoder-only models can be converted",
            "Choose a causal language model, such as a Llama, Qwen, Gemma or GPT-2 checkpoint.",
        )
    calls = probe(model)
    if not calls:
        found = sorted({type(m).__name__ for m in model.modules() if "attention" in type(m).__name__.lower()})
        raise UserError(
            f"{kind} cannot be converted: no layer calls transformers' attention interface"
            + (f" (its own code computes {', '.join(found)})" if found else " (it has no softmax attention)"),
            "`linearize inspect MODEL` shows what a model can do.",
        )
    names = {module: name for name, module in model.named_modules()}
    cache = DynamicCache(config=model.config)
    return [
        Layer(names[module], geometry(call), refusal(module, call, cache)) for module, call in calls.items()
    ]


def probe(model: PreTrainedModel) -> dict[nn.Module, Call]:
    """Two forwards of three tokens: the first finds the modules, the second, with a cache, sees what reaches
    each.
    """
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    configs = [c for c in configs if hasattr(c, "_attn_implementation_internal")]
    before = [c._attn_implementation_internal for c in configs]
    training = model.training
    recorder, hooks = Probe(), []
    AttentionInterface.register(PROBE, recorder)
    AttentionMaskInterface.register(PROBE, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    try:
        model.eval()
        for config in configs:
            config._attn_implementation_internal = PROBE
        ids = torch.arange(1, 4, device=model.device)[None]
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
            for module in recorder.calls:
                hooks.append(module.register_forward_pre_hook(send_marker, with_kwargs=True))
            recorder.calls.clear()
            model(input_ids=ids, use_cache=True)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name
        AttentionInterface._global_mapping.pop(PROBE, None)
        AttentionMaskInterface._global_mapping.pop(PROBE, None)
    return recorder.calls


def send_marker(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """As `runtime.dispatch.pass_state`, with a marker in place of the state."""
    parameters = signature(module.forward).parameters.values()
    if find_cache(args, kwargs) is None or all(p.kind is not Parameter.VAR_KEYWORD for p in parameters):
        return None
    return args, {**kwargs, "linearize_state": PROBE}


def geometry(call: Call) -> dict[str, Any]:
    scale = call.extra.get("scaling")
    softcap = call.extra.get("softcap")
    return {
        "heads": call.query[1],
        "kv_heads": call.key[1],
        "key_dim": call.query[3],
        "value_dim": call.value[3],
        "scale": float(call.query[3] ** -0.5 if scale is None else scale),
        "softcap": None if softcap is None else float(softcap),
    }


def refusal(module: nn.Module, call: Call, cache: DynamicCache) -> str | None:
    """Why a layer cannot be converted; None: it can."""
    if call.query[2] != call.key[2]:
        return "cross-attention: its keys come from elsewhere"
    if not is_causal(module, call):
        return "its attention is not causal"
    if call.count > 1:
        return f"it calls attention {call.count} times in one forward"
    tensors = {name: x for name, x in call.extra.items() if isinstance(x, torch.Tensor) and name != "s_aux"}
    bias = [name for name, tensor in tensors.items() if tensor.is_floating_point()]
    if bias or has_bias(call.mask):
        return f"it adds a bias to its scores ({bias[0] if bias else 'in the mask'})"
    if call.extra.get("linearize_state") != PROBE:
        return "it is given no cache, or passes no keyword arguments on: a state cannot reach its attention"
    if not isinstance(getattr(module, "layer_idx", None), int):
        return "it has no layer_idx, so it has no place in a cache"
    if getattr(module, "is_kv_shared_layer", False) or getattr(module, "store_full_length_kv", False):
        return "it shares keys and values with other layers"
    place = cache.layers[module.layer_idx] if module.layer_idx < len(cache.layers) else None
    if type(place) not in (DynamicLayer, DynamicSlidingWindowLayer):
        return "its cache holds more than keys and values (a recurrent state or an index, say)"
    return None


def is_causal(module: nn.Module, call: Call) -> bool:
    if call.mask is None:
        return bool(getattr(module, "is_causal", True))
    seen = call.mask[0, 0] if call.mask.dtype == torch.bool else call.mask[0, 0] > -1e4
    return bool((seen == torch.ones_like(seen).tril()).all())


def has_bias(mask: torch.Tensor | None) -> bool:
    """Whether an additive mask holds more than 0 and minus infinity."""
    return mask is not None and mask.dtype != torch.bool and bool(((mask != 0) & (mask > -1e4)).any())


def choose_layers(layers: list[Layer], keep: str | None = None) -> tuple[list[Layer], list[Layer]]:
    """The layers to convert, and those that stay softmax.

    Args:
        keep: softmax layers to keep besides: `N`, evenly spread, or `at:i,j,k`, counted from 0. Those of
            `auto:N` are chosen later and count as linear here.

    Raises:
        UserError: none can be converted, or `keep` names what is not there.
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
    """How many layers to keep by measured KL: N of `auto:N`, else 0."""
    return int(keep.removeprefix(AUTO)) if keep and keep.startswith(AUTO) else 0


def kept_indices(keep: str, count: int) -> list[int]:
    """Which of `count` layers to keep: `2` of 8 are the layers 2 and 6; none yet of `auto:2`."""
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
        f"Use a number below {count} (spread evenly), auto:N with such a number (chosen by KL), or at:i,j,k with "
        f"some of the layers 0 to {count - 1}.",
    )
