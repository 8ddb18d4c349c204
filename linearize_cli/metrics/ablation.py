"""Ablation of the converted layers: the model without their local part, or without their linear part."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from linearize_cli.runtime.dispatch import converted

ABLATIONS = {"local_only": "far", "linear_only": "local"}  # name of a measurement -> the part that is dropped


def has_both_parts(model: PreTrainedModel) -> bool:
    """Return True if the model's method has a local and a linear part."""
    attention = model.config.linearize["attention"]
    return bool(attention.get("local") and attention.get("far"))


@contextmanager
def without(model: PreTrainedModel, part: str) -> Iterator[None]:
    """Drop one part of every converted layer, from its output and its normaliser, while the context is open.

    Args:
        part: the part to drop: "local", or "far" for the linear part. The convolution always stays.
    """
    layers = [module.linear_attention for module in converted(model).values()]
    try:
        for layer in layers:
            layer.dropped = part
        yield
    finally:
        for layer in layers:
            layer.dropped = None
