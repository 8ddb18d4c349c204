"""Checks that the forms of a converted model compute the same."""

import inspect

import torch
from families import SENSITIVE, SMALL, swap
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from linearize_cli.models.decoding import forward, unpadded
from linearize_cli.runtime.dispatch import attention_implementation
from linearize_cli.runtime.model import linear_parameters

# Wider than any sequence here.
WINDOW = {"local": {"scope": "sliding", "size": 64, "score": "softmax"}, "combine": "shared"}
LENGTH = 30  # tokens: sinks, several windows of 8, and a group boundary in the pads
PADS = 9


def tokens(rows: int = 2, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, SMALL["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(1))


def padded_tokens() -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows, the first with pads on its left, and their mask."""
    ids, mask = tokens(), torch.ones(2, LENGTH, dtype=torch.long)
    ids[0, :PADS], mask[0, :PADS] = SMALL["pad_token_id"], 0
    return ids, mask


@torch.no_grad()
def incremental(model, ids, sizes, mask=None) -> torch.Tensor:
    """Logits of the tokens fed in pieces of the given sizes, with one cache."""
    cache, logits, start = None, [], 0
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    for size in sizes:
        end, padding = start + size, {}
        if mask is not None:
            padding["attention_mask"] = mask[:, :end]
            if takes_positions:
                padding["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)[:, start:end]
        output = model(ids[:, start:end], past_key_values=cache, use_cache=True, **padding)
        cache, start = output.past_key_values, end
        logits.append(output.logits)
    assert start == ids.shape[1]
    return torch.cat(logits, 1)


def close(logits: torch.Tensor, reference: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert reference.isfinite().all()
    atol = tolerance * max(1.0, float(reference.abs().max()))
    torch.testing.assert_close(logits, reference, atol=atol, rtol=0.0)


def generate(model, ids, mask=None, **options) -> torch.Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"do_sample": False, "disable_compile": True, "max_new_tokens": 16, **options}
    torch.manual_seed(0)  # of sampling
    out = model.generate(ids, attention_mask=mask, min_new_tokens=options["max_new_tokens"], **options)
    return out[:, ids.shape[1] :]


def check_family(family: str, model) -> None:
    if family in SENSITIVE:
        check_forms(model, 1e-4)
        check_forms(model.double(), 1e-10)
    else:
        check_forms(model)


def check_forms(model, tolerance: float = 1e-5) -> None:
    """One forward == token by token == uneven pieces; the same with pads, which change nothing."""
    ids = tokens()
    with torch.no_grad():
        full, alone = model(ids).logits, unpadded(model, ids[0, PADS:], PADS)[None]
        placed = forward(model, ids)
    assert full.std() > 0.02
    # The native linear layers of some families agree with themselves no better than this.
    layers = DynamicCache(config=model.config).layers
    if any(isinstance(x, LinearAttentionCacheLayerMixin) for x in layers):
        tolerance = 1e-4
    for sizes in ([1] * LENGTH, [11, 1, 5, 13]):
        close(incremental(model, ids, sizes), full, tolerance)
    ids, mask = padded_tokens()
    for sizes in ([LENGTH], [12, 1, 4] + [1] * 13):
        padded = incremental(model, ids, sizes, mask)
        close(padded[:1, PADS:], alone, tolerance)
        close(padded[1:], placed[1:], tolerance)


def check_wide_window(model) -> None:
    """Converts a base model with WINDOW and compares it with its own softmax, pads included: scale, soft cap,
    sinks, head groups, biases and pads are the base's, so only far tokens may tell the two apart.
    """
    native = model.config._attn_implementation
    swap(model, WINDOW)
    ids, mask = padded_tokens()
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
        with attention_implementation(model, native):
            base = model(ids, attention_mask=mask).logits
    close(logits[mask > 0], base[mask > 0])


def check_gradients(model) -> None:
    """Every new parameter of a converted model is trained."""
    model.train()(tokens(), use_cache=False).logits.square().mean().backward()
    assert linear_parameters(model)
    for name, parameter in model.named_parameters():
        if "linear_attention" in name:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name
