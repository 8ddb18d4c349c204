"""Quantised checkpoints. They are dequantised while they are loaded, because a conversion trains the weights."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from linearize_cli.errors import Notice, UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

# The values of `quant_method` that transformers dequantises on every device: the last one after it has loaded
# the model, with the package of that name.
DEQUANTISED = ("fp8", "mxfp4", "bitsandbytes")


def method_of(config: PreTrainedConfig) -> str:
    """Return the quantisation method of a checkpoint (`fp8`).

    Return an empty string if it is not quantised, or if it is an artifact, which is used as it is.
    """
    settings = getattr(config, "quantization_config", None)
    if not settings or config.model_type == "linearized":
        return ""
    return settings.get("quant_method") or "unknown method"


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
    """Tell the user that the weights are dequantised.

    Args:
        name: the model or its file.
        kind: the quantisation method or types.
        dtype: the dtype of the dequantised weights.
    """
    text = f"{name} is quantised ({kind}): its weights are dequantised to {str(dtype).removeprefix('torch.')}"
    warnings.warn(f"{text}, and an artifact made from it is not quantised", Notice, stacklevel=2)


def make_ordinary(loaded: PreTrainedModel, dtype: torch.dtype) -> None:
    """Turn a dequantised model into one that is saved as if it had never been quantised.

    Args:
        dtype: the dtype of its parameters. transformers casts only those that were quantised.
    """
    if loaded.is_quantized:
        loaded.dequantize()
    loaded._weight_conversions = None  # saving would reverse them, and write scales again
    for parameter in loaded.parameters():
        parameter.data = parameter.data.to(dtype)
