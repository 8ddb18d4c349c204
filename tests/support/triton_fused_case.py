"""Triton's fused prefill, without gradients, against the torch forms in fp64: outputs and every part of the state."""

import copy
from dataclasses import fields, replace

import torch

SLIDING = dict(size=20, feature_map="hedgehog", feature_dim=16, key_weight=True, conv_width=5, sinks=3)
GROUP = dict(scope="group", size=16, score="relu2", feature_map="identity", combine="none", conv_width=5)
FUSED = {  # `turns` are the tokens of consecutive calls; a call with few tokens may be computed by another form
    "sliding": dict(turns=(75,), **SLIDING),
    "several segments": dict(turns=(150,), chunk=16, **SLIDING),
    "chunks beyond the tile": dict(turns=(70,), chunk=64, **SLIDING),
    "second turn": dict(turns=(43, 32), **SLIDING),
    "first turn shorter than the window": dict(turns=(10, 43, 32), **SLIDING),
    "no conv, no sinks, no shared keys": dict(
        turns=(75, 30), kv_heads=2, **SLIDING | dict(sinks=0, conv_width=0, feature_map="relu")
    ),
    "a head of features for each query": dict(
        turns=(75, 20), **SLIDING | dict(feature_map="elu", per_query_head=True, key_weight=False)
    ),
    "conv beyond the window": dict(
        turns=(50, 31), **SLIDING | dict(size=9, conv_width=24, feature_map="relu")
    ),
    "vectors that are not contiguous": dict(turns=(40, 30), transposed=True, **SLIDING),
    "a state with noise in its empty slots": dict(turns=(4, 40), noise=True, **SLIDING),
    "odd widths": dict(turns=(50, 31), width=24, values=40, **SLIDING | dict(feature_dim=12)),
    "bfloat16": dict(turns=(75, 20), dtype=torch.bfloat16, **SLIDING),
    "float16": dict(turns=(75, 20), dtype=torch.float16, **SLIDING),
    "group": dict(turns=(75,), **GROUP),
    "turns inside a group": dict(turns=(43, 32, 1, 50), **GROUP),
    "turns of whole groups": dict(turns=(16, 32, 3, 64, 90), **GROUP),
    "tiles smaller than groups": dict(turns=(70, 75), **GROUP | dict(size=64, conv_width=9)),
    "group, hedgehog, conv of a group": dict(
        turns=(70, 70), **GROUP | dict(feature_map="hedgehog", feature_dim=24, conv_width=17)
    ),
    "group, conv beyond a group": dict(turns=(40, 70), **GROUP | dict(conv_width=40)),
    "group, vectors that are not contiguous": dict(turns=(40, 30), transposed=True, **GROUP),
    "group, a state with noise in its empty slots": dict(turns=(4, 40), noise=True, **GROUP),
    "group, elu, no conv": dict(
        turns=(10, 70, 70), kv_heads=2, **GROUP | dict(feature_map="elu", conv_width=0)
    ),
    "group, odd widths": dict(turns=(33, 50), width=24, values=40, **GROUP | dict(key_weight=True)),
    "group, bfloat16": dict(turns=(75, 40), dtype=torch.bfloat16, **GROUP),
}


def fused_errors(
    turns,
    dtype=torch.float32,
    chunk=32,
    kv_heads=1,
    width=16,
    values=16,
    transposed=False,
    noise=False,
    **parts,
):
    """Compute the relative errors of the outputs, and of the state after all turns, by name.

    q, k and v are views of tensors `[B, T, heads, X]`, as a model's projections make them. With `transposed`, their
    last dimension is not contiguous. With `noise`, the state has large numbers where it has no recent tokens.
    """
    from linearize_kernels import Equation, LinearAttention, chunked

    torch.manual_seed(0)
    geometry = dict(heads=2, kv_heads=kv_heads, key_dim=width, value_dim=values, scale=width**-0.5)
    attention = LinearAttention(Equation(**geometry, **parts))
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    shapes = (2, width), (kv_heads, width), (kv_heads, values)
    heads = [(torch.randn(2, sum(turns), n, x) + 0.3).to(dtype).transpose(1, 2) for n, x in shapes]
    if transposed:
        heads = [x.mT.contiguous().mT for x in heads]
    found = []
    for impl, wide in (("triton", dtype), ("torch", torch.float64)):
        copied = copy.deepcopy(attention).to(torch.float64 if impl == "torch" else torch.float32)
        copied.impl, state, outputs = impl, None, []
        with torch.no_grad():
            for turn in zip(*(x.to(wide).split(turns, -2) for x in heads), strict=True):
                out, state = chunked(copied, state, *turn, chunk=None if "scope" in parts else chunk)
                outputs.append(out)
                if noise:
                    empty = (state.recent_position < 0)[:, None, :, None]
                    recent = (x.masked_fill(empty, 100.0) for x in (state.recent_k, state.recent_v))
                    state = replace(state, **dict(zip(("recent_k", "recent_v"), recent, strict=True)))
        states = {field.name: getattr(state, field.name) for field in fields(state)}
        found.append(dict(out=torch.cat(outputs, -2)) | states)
    errors = {}
    for name, expected in found[1].items():
        difference = (found[0][name].double() - expected.double()).norm()
        errors[name] = (difference / expected.double().norm().clamp_min(1e-12)).item()
    return errors
