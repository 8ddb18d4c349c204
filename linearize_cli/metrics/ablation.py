"""A model with one part of its linear layers left out: what does the other carry?"""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from linearize_cli.runtime.dispatch import converted

ABLATIONS = {"local_only": "far", "linear_only": "local"}  # a measurement's name: the part that it leaves out


def has_both_parts(model: PreTrainedModel) -> bool:
    attention = model.config.linearize["attention"]
    return bool(attention.get("local") and attention.get("far"))


@contextmanager
def without(model: PreTrainedModel, part: str) -> Iterator[None]:
    """Leave a part ("local" or "far") out of every converted layer, of the normaliser too; the conv stays."""
    layers = [module.linear_attention for module in converted(model).values()]
    try:
        for layer in layers:
            layer.dropped = part
        yield
    finally:
        for layer in layers:
            layer.dropped = None
