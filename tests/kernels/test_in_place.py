"""States that decoding changes in place, in a whole model."""

import in_place_case
import pytest
import torch
from families import AUGMENTED, swapped
from interpreted import printed
from transformers import DynamicCache

from linearize_cli.models.decoding import forward

pytest.importorskip("triton")


def test_logits_are_those_of_states_made_anew():
    found = printed(in_place_case)
    assert found.keys() == {"decoded", "tree", "after a path", "after paths", "captured"}
    assert max(found.values()) < 1e-5, found


@torch.no_grad()
@pytest.mark.parametrize(
    "keep, reason", [(0, "not every layer runs on the Triton kernels"), (1, "DynamicLayer")]
)
def test_no_graph_of_what_moves(keep, reason, monkeypatch):
    monkeypatch.syspath_prepend(in_place_case.BENCHMARKS)
    from cuda_graph import Captured

    model, ids = swapped("llama", AUGMENTED, keep=keep), torch.randint(1, 50, (2, 9))
    cache = DynamicCache(config=model.config)
    forward(model, ids, cache)
    with pytest.raises(ValueError, match=reason):
        Captured(model, cache, torch.tensor([9, 9]))
