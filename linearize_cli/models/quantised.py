"""Quantised checkpoints. They are dequantised while they are loaded, because a conversion trains the weights."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from linearize_cli.errors import Notice, UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

# The values of `quant_method` that transformers dequantises while it loads, on every device.
DEQUANTISED = ("fp8", "mxfp4")


def method_of(config: PreTrainedConfig) -> str:
    """Return the quantisation method of a checkpoint (`fp8`). Empty if it is not quantised."""
    settings = getattr(config, "quantization_config", None) or {}
    return str(settings.get("quant_method", "of an unknown kind")) if settings else ""


def request_dequantisation(model: str, config: PreTrainedConfig) -> None:
    """Set the config of a quantised checkpoint so that transformers dequantises the weights.

    Raises:
        UserError: transformers cannot dequantise them.
    """
    method = method_of(config)
    if method and method not in DEQUANTISED:
        raise UserError(
            f"{model} is quantised ({method}), and cannot be converted.",
            f"Use the checkpoint that it was made from. Only {', '.join(DEQUANTISED)} and GGUF are dequantised.",
        )
    if method:
        config.quantization_config = {**config.quantization_config, "dequantize": True}


def announce(name: str, kind: str, dtype: torch.dtype) -> None:
    """Tell the user that the weights are dequantised. Do nothing if they are not quantised.

    Args:
        name: the model or its file.
        kind: the quantisation method or types. Empty if there is none.
        dtype: the dtype of the dequantised weights.
    """
    if kind:
        text = f"{name} is quantised ({kind}): its weights are dequantised to {str(dtype).removeprefix('torch.')}"
        warnings.warn(f"{text}, and an artifact made from it is not quantised", Notice, stacklevel=2)
