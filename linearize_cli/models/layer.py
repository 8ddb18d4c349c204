"""The description of one attention layer of a base model."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Layer:
    """An attention module of a base model: its sizes, and the reason if it must stay softmax.

    Attributes:
        name: the module's name in the model.
        geometry: the keyword arguments of `runtime.layer.equation`, such as numbers of heads and head sizes.
        refusal: the reason why it cannot be converted. None if it can.
        bias: `[heads, distances]`, the bias that the base model adds to scores by token distance (ALiBi, T5),
            0 at distance 0. A causal layer has distances 0, 1, ...; a bidirectional one those ahead, 0, and
            those back. None if the model adds none.
        caches: True if the softmax layer caches the keys and values of all decoded tokens.
    """

    name: str
    geometry: dict[str, Any]
    refusal: str | None = None
    bias: torch.Tensor | None = None
    caches: bool = True

    @property
    def causal(self) -> bool:
        return self.geometry.get("causal", True)
