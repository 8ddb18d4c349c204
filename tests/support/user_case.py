"""Scripts and calls of a user of transformers."""

import pytest
import torch

import linearize_cli.runtime  # noqa: F401

KEEP = pytest.mark.parametrize("keep", [0, 1])


def run(model, ids, **given) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **given).logits


def generate(model, ids, mask=None, new=12, **options):
    """The ids and as many new tokens, greedily where nothing else is asked for."""
    length = dict(max_new_tokens=new, min_new_tokens=new, pad_token_id=0)
    return model.generate(ids, attention_mask=mask, **{"do_sample": False, **length, **options})
