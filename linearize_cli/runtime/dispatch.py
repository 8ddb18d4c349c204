"""The connection of converted layers to transformers: the attention interface, masks and the cache.

Functions are registered for the whole process, and artifacts with different versions of this code may run in
one process. So the registered functions only call methods of the module that they get.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from linearize_cli.runtime.masks import document_mask, exporting, first_column, is_compact
from linearize_cli.runtime.packed import document_starts
from linearize_cli.runtime.places import check_softmax, find_cache

IMPLEMENTATION = "linearize"
Module = Any  # a module with attributes of its own, which nn.Module does not declare


def attention_forward(
    module: Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs
) -> tuple[Tensor, None]:
    return module.linear_attention(query, key, value, attention_mask, **kwargs), None


def compact_mask(
    q_length: int, q_offset: int | Tensor = 0, attention_mask: Tensor | None = None, **kwargs
) -> Tensor | None:
    """Return the compact mask that linear layers get from transformers: `[B, 1, T, 1]` int8, 0 for pads, else
    1.

    It is None if no new token is a pad. Compiled code cannot find that out, and always gets a mask if the
    user gave one.

    Args:
        q_length: T, the number of new tokens.
        q_offset: the number of tokens in the cache. It is a tensor for a static cache, which is still empty
            then.
        attention_mask: `[B, N]`, 0 for pads, for the tokens in the cache, the new ones, and possibly more
            after them. Or None.

    Raises:
        ValueError: the mask has not 2 dimensions, or fewer columns than there are new tokens.
    """
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise ValueError(f"an attention mask has 2 or 4 dimensions, not {attention_mask.dim()}")
    if attention_mask.shape[-1] < q_length:
        raise ValueError(
            f"an attention mask of {attention_mask.shape[-1]} tokens is too short for {q_length}"
        )
    start = first_column(attention_mask, q_length, 0 if isinstance(q_offset, Tensor) else q_offset)
    mask = attention_mask[:, start : start + q_length]
    if not torch.compiler.is_compiling() and bool(mask.all()):
        return None
    return mask.to(torch.int8)[:, None, :, None]


AttentionInterface.register(IMPLEMENTATION, attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, compact_mask)


def pass_state(module: Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Add the module's cache layer to its keyword arguments, as `linearize_state`.

    It is a forward pre-hook of converted attention modules. Nothing is added without a cache, or while
    another attention implementation is selected.
    """
    if module.config._attn_implementation != IMPLEMENTATION:
        return None
    cache = find_cache(args, kwargs)
    if cache is None:
        return None
    return args, {**kwargs, "linearize_state": module.linear_attention.place(cache, module.layer_idx)}


def examine(module: Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Find packed documents in a model's inputs, and pass them to the layers as an attention mask.

    A document begins where `position_ids` start again. Not all models pass these on to their layers, so this
    is a forward pre-hook of the model. Models with kept softmax layers make such a mask themselves. Under
    torch.compile the values of masks cannot be read. If a row may hold several documents there,
    `linearize_eagerly` makes the layers run outside compiled code.
    """
    mask, positions, cache = (
        kwargs.get("attention_mask"),
        kwargs.get("position_ids"),
        find_cache(args, kwargs),
    )
    compiling = torch.compiler.is_compiling()
    if exporting():
        check_export(mask, positions)
    elif mask is None and positions is not None and cache is None:
        starts = starts_in(positions)
        if starts is not None and is_linearized_config(module.config):
            return args, {**kwargs, "attention_mask": document_mask(starts)}
        if starts is not None and compiling:
            return args, {**kwargs, "linearize_eagerly": True}
    elif compiling and is_custom(mask):
        return args, {**kwargs, "linearize_eagerly": True}
    return None


def is_custom(mask: Tensor | None) -> bool:
    """Return True for a 4-D attention mask for several new tokens, which only the user can have passed."""
    return isinstance(mask, Tensor) and mask.dim() == 4 and not is_compact(mask) and mask.shape[-2] > 1


def check_export(mask: Tensor | None, positions: Tensor | None) -> None:
    """Refuse to export a model with inputs that may hold several documents in a row.

    Without a mask, a check is added to the exported model: its `position_ids` must not start again within a
    row.

    Raises:
        ValueError: the mask has 4 dimensions.
    """
    if is_custom(mask):
        raise ValueError("export a linearized model with an attention mask of 2 dimensions, or none")
    if mask is None and positions is not None and positions.dim() == 2:
        message = "an exported linearized model takes one document a row: position_ids must not start again"
        torch._assert_async((positions.diff(dim=-1) == 1).all(), message)


starts_in = torch.compiler.disable(document_starts)


def attach(model: Module, layers: dict[str, Module]) -> None:
    """Attach linear attention to modules, and select it as their attention implementation. Other layers do
    not change.

    If all attention modules that share a config object are converted, the implementation is also selected in
    that config. The model then makes no O(T²) mask. This is not done if the model's own code works on that
    mask (`adapters.Adapter.native_mask`).

    Args:
        model: a model whose config has the `linearize` record.
        layers: the linear attention of each module, by the module's name.
    """
    record = model.config.linearize
    modules = [model.get_submodule(name) for name in layers]
    configs = [module.config for module in modules if not getattr(module, "native_mask", False)]
    # An attention to an encoder reads the source's pads from the base model's own mask.
    native = [
        *record["softmax"],
        *(name for name, geometry in record["layers"].items() if "cross" in geometry),
    ]
    kept = {id(model.get_submodule(name).config) for name in native}
    for name, linear_attention in layers.items():
        module = model.get_submodule(name)
        # Under construction some parameters may be real already (DiffLlama's), others on meta.
        device = min((p.device for p in module.parameters()), key=lambda device: device.type != "meta")
        module.linear_attention = linear_attention.to(device, torch.float32)
        own = copy.copy(module.config)
        own._attn_implementation_internal = IMPLEMENTATION
        linear_attention.mask_limit = mask_limit(model, module, id(module.config) in kept)
        set_config(module, own)
        module.register_forward_pre_hook(pass_state, with_kwargs=True)
    for name in record["softmax"]:
        model.get_submodule(name).register_forward_pre_hook(check_softmax, with_kwargs=True)
    model.base_model.register_forward_pre_hook(examine, with_kwargs=True)
    for config in configs:
        if id(config) not in kept:
            config._attn_implementation_internal = IMPLEMENTATION


def mask_limit(model: Module, module: Module, beside_softmax: bool) -> float:
    """Return the largest number of columns at which a module's 4-D masks only hide pads, other documents and
    later tokens.

    Larger masks hide or bias tokens in ways that a linear layer must ignore. The limit is 0 for masks with
    biases and for models with images, the chunk's size for chunked attention, and infinite otherwise.

    Args:
        beside_softmax: True if the module shares its config, and so its masks, with kept softmax layers.
    """
    if getattr(module, "mask_has_biases", False) or (
        beside_softmax and hasattr(model.config, "vision_config")
    ):
        return 0
    types, index = getattr(module.config, "layer_types", None), getattr(module, "layer_idx", None)
    if beside_softmax and types and index is not None and types[index : index + 1] == ["chunked_attention"]:
        return module.config.attention_chunk_size
    return inf


def set_config(module: Module, config: PreTrainedConfig) -> None:
    """Replace the config of a module, and of its submodules that share it."""
    before = module.config
    for part in module.modules():
        if getattr(part, "config", None) is before:
            part.config = config


def converted(model: nn.Module) -> dict[str, nn.Module]:
    """Return the converted attention modules of a model, by name."""
    return {name: m for name, m in model.named_modules() if hasattr(m, "linear_attention")}


@contextmanager
def attention_implementation(model: Module, name: str) -> Iterator[None]:
    """Run the converted layers with another attention implementation while the context is open.

    Examples are "sdpa", which gives the softmax teacher, and an implementation that records its inputs.

    Args:
        name: the implementation's name in transformers. If the model has kept softmax layers, it must take
            masks of the kind that they use, because one mask serves all layers.
    """
    configs = {
        id(m.config): m.config for m in model.modules() if is_linearized_config(getattr(m, "config", None))
    }
    for config in configs.values():
        config._attn_implementation_internal = name
    try:
        yield
    finally:
        for config in configs.values():
            config._attn_implementation_internal = IMPLEMENTATION


def is_linearized_config(config: object) -> bool:
    """Return True if a config selects our attention implementation."""
    return getattr(config, "_attn_implementation_internal", None) == IMPLEMENTATION
