"""Bytes that a sequence holds while it is decoded: a state of fixed size, or keys and values per token."""

from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from linearize_cli.plan import Layer
from linearize_cli.runtime.dispatch import converted


def state_bytes(model: PreTrainedModel) -> int:
    """Bytes of all linear layers' states, for one sequence of any length."""
    return sum(
        module.linear_attention.empty_state(1, "cpu", model.dtype).nbytes()
        for module in converted(model).values()
    )


def kv_bytes_per_token(layers: Iterable[Layer], dtype: torch.dtype) -> int:
    """Bytes of keys and values that softmax attention in these layers keeps per token."""
    numbers = sum(x.geometry["kv_heads"] * (x.geometry["key_dim"] + x.geometry["value_dim"]) for x in layers)
    return numbers * torch.empty(0, dtype=dtype).element_size()
