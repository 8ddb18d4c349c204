"""What a conversion knows of one attention layer."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Layer:
    """One attention module: its geometry (see `runtime.layer.equation`) and why it must stay softmax.

    Attributes:
        bias: `[heads, distances]` what the base model adds to a score by the distance of its tokens, where it
            does, laid out as `LinearAttention.distance_bias`; 0 at distance 0.
        caches: whether softmax attention in it keeps keys and values of every token that is decoded.
    """

    name: str
    geometry: dict[str, Any]
    refusal: str | None = None
    bias: torch.Tensor | None = None
    caches: bool = True

    @property
    def causal(self) -> bool:
        return self.geometry.get("causal", True)
