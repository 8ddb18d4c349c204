"""The chunked forms in Triton, against `sliding.sliding` and `grouped.grouped` in fp64.

Packed sequences are compared with `chunked` on each sequence, and tree nodes with `block`. Run as a script, it
prints the relative error of every output and gradient of every case as JSON. Its argument is the device: with "cpu"
the kernels run in Triton's interpreter, with "cuda" they are compiled.
"""

import copy
import json
import os
import sys

import torch

CASES = {
    "plain": dict(),
    "window below recent, group of two": dict(
        group=2, recent=20, size=13, skip=3, start=7, width=8, values=32
    ),
    "start of a text": dict(start=-2, skip=19, chunks=2, sinks=3, keys=24, features=24),
    "no far part": dict(far=False, size=9, start=30),
    "no far part, conv beyond the window": dict(far=False, recent=12, size=5, width=12, sinks=0),
    "no conv, no sinks": dict(width=0, sinks=0, start=40, skip=0),
    "window shorter than chunks": dict(chunk=32, chunks=2, recent=5, size=5, width=3, group=3, heads=1),
    "tiles smaller than chunks": dict(
        chunk=64, chunks=2, recent=24, size=20, skip=4, heads=1, tiles=(16, 32, 16)
    ),
    "segments of chunks": dict(chunks=10, recent=8, size=7, heads=1, features=16),
    "bfloat16": dict(dtype=torch.bfloat16, group=2, heads=1),
    "float16": dict(dtype=torch.float16, heads=1, recent=24, size=20),
    "ahead": dict(ahead=16, start=2),
    "ahead, group of two, odd widths": dict(
        ahead=28,
        recent=20,
        size=13,
        skip=23,
        start=2,
        chunks=4,
        group=2,
        width=8,
        values=24,
        features=24,
        heads=1,
    ),
    "ahead, no far part": dict(ahead=20, far=False, recent=12, size=9, skip=14, start=2),
    "ahead, no far part, conv beyond the window": dict(
        ahead=20, far=False, recent=12, size=5, width=21, sinks=0, skip=12
    ),
    "ahead, no conv, no sinks": dict(ahead=16, width=0, sinks=0, heads=1),
    "ahead, tiles smaller than chunks": dict(
        ahead=44, chunk=32, chunks=2, recent=20, size=18, width=31, start=2, heads=1, tiles=(16, 16, 16)
    ),
    "ahead, segments of chunks": dict(ahead=8, chunks=10, recent=8, size=7, start=2, heads=1, features=16),
    "ahead, bfloat16": dict(ahead=16, start=2, dtype=torch.bfloat16, group=2, heads=1),
}
GROUP_CASES = {
    "plain": dict(),
    "none folded": dict(folds=0, group=2),
    "all folded, odd widths": dict(folds=3, keys=24, values=40, features=24, recent=7),
    "no far part": dict(far=False, group=2),
    "no conv": dict(width=0, recent=0),
    "no far part, no conv": dict(far=False, width=0, recent=0, heads=1),
    "conv beyond a group": dict(width=24, recent=23, heads=1),
    "tiles smaller than groups": dict(chunk=64, chunks=2, width=9, recent=8, heads=1, tiles=(32, 16, 16)),
    "segments of groups": dict(chunks=12, folds=9, heads=1, features=16),
    "bfloat16": dict(dtype=torch.bfloat16, group=2),
    "float16": dict(dtype=torch.float16, folds=1),
}
LAYERS = {
    "sliding": dict(size=20, feature_map="hedgehog", feature_dim=16, key_weight=True, conv_width=5, sinks=3),
    "encoder": dict(
        causal=False, size=20, feature_map="hedgehog", feature_dim=16, key_weight=True, conv_width=5, sinks=3
    ),
    "group": dict(
        scope="group", size=16, score="relu2", feature_map="identity", combine="none", conv_width=5
    ),
}
CAUSAL = [form for form, parts in LAYERS.items() if parts.get("causal", True)]
LENGTHS = (1, 16, 2, 37, 33)  # one token, one chunk, fewer tokens than sinks, several chunks
PACKED = {
    "sliding": LAYERS["sliding"],
    "sliding, tiles smaller than chunks": dict(
        size=20,
        feature_map="hedgehog",
        conv_width=5,
        sinks=3,
        chunk=32,
        tiles=(16, 16, 16),
        lengths=(33, 2, 30),
    ),
    "sliding, a head of features for each query": dict(
        size=16, feature_map="hedgehog", feature_dim=8, per_query_head=True, lengths=(18, 40)
    ),
    "sliding, no far part, conv beyond the window": dict(size=9, conv_width=24, sinks=2, kv_heads=2),
    "sliding, bfloat16": LAYERS["sliding"] | dict(dtype=torch.bfloat16, lengths=(21, 3, 37)),
    "group": LAYERS["group"],
    "group, conv beyond a group": LAYERS["group"] | dict(conv_width=24, kv_heads=2),
    "group, tiles smaller than groups": LAYERS["group"]
    | dict(size=32, conv_width=9, tiles=(16, 16, 16), lengths=(33, 2, 30)),
    "group, no far part": dict(scope="group", size=16, score="relu2", combine="none", conv_width=5),
}


def inputs(
    dtype=torch.float32, heads=2, group=1, chunk=16, chunks=3, recent=16, size=16, start=50, skip=0, keys=16,
    values=16, features=32, width=4, sinks=2, far=True, ahead=0,
):  # fmt: skip
    """Make a shape and random tokens of the sliding form.

    Keys and values have a common mean: sums of random signs would hide errors that add up.
    """
    from linearize_kernels.torch_forms.sliding import Shape, Tokens

    torch.manual_seed(0)
    rows = chunks * chunk
    end = recent + rows
    slots = end + ahead

    def draw(*shape):
        return torch.randn(shape)

    k, v = draw(heads, slots, keys) + 1, draw(heads, slots, values) + 1
    v[:, : max(0, skip - sinks)] = v[:, end:] = 0
    phi_q = phi_k = mix = None
    if far:
        phi_q, phi_k = draw(heads, group, rows, features).softmax(-1), draw(heads, slots, features).exp()
        phi_k[:, :skip] = phi_k[:, end:] = 0
        mix = draw(heads, group, rows)
        mix[:, :, :5] = float("-inf")
    tokens = Tokens(
        q=draw(heads, group, rows, keys),
        k=k,
        v=v,
        phi_q=phi_q,
        phi_k=phi_k,
        mix=mix,
        conv=draw(heads, group, width) / 2 if width else None,
        S=draw(heads, features, values) + 5,
        z=draw(heads, features).exp() * 5,
        sink_k=draw(heads, sinks, keys),
        sink_v=draw(heads, sinks, values),
    )
    tokens = narrowed(tokens, dtype, ("mix", "conv", "S", "z"))
    return Shape(chunk, recent, size, keys**-0.5, start, skip, ahead=ahead), tokens


def group_inputs(
    dtype=torch.float32, heads=2, group=1, chunk=16, chunks=3, folds=2, recent=4, keys=16, values=16, features=32,
    width=5, far=True,
):  # fmt: skip
    """Make a tiling, the number of folded groups and random tokens of the group form.

    Keys and queries have unit norms. The first and the last tokens are empty slots.
    """
    from linearize_kernels.parts.feature_maps import unit_norm
    from linearize_kernels.torch_forms.chunks import Tiling
    from linearize_kernels.torch_forms.grouped import Groups

    torch.manual_seed(0)
    rows = chunks * chunk
    present = (torch.arange(rows) >= 3) & (torch.arange(rows) < rows - 2)

    def draw(*shape):
        return torch.randn(shape)

    def tokenwise(x):
        return x * present[:, None]

    phi_q = phi_k = factor = None
    if far:
        phi_q = tokenwise(draw(heads, group, rows, features).softmax(-1))
        phi_k, factor = tokenwise(draw(heads, rows, features).exp()), draw(heads, group)
    tokens = Groups(
        q=tokenwise(unit_norm(draw(heads, group, rows, keys) + 0.5)),
        k=tokenwise(unit_norm(draw(heads, rows, keys) + 1)),
        v=draw(heads, recent + rows, values) + 1,
        phi_q=phi_q,
        phi_k=phi_k,
        factor=factor,
        conv=draw(heads, group, width) / 2 if width else None,
        S=draw(heads, features, values) + 5,
    )
    return Tiling(chunk, recent), folds, narrowed(tokens, dtype, ("factor", "conv", "S"))


def narrowed(tokens, dtype, wide):
    """Convert tokens to a dtype, except for the fields named in `wide`."""
    named = zip(tokens._fields, tokens, strict=True)
    return type(tokens)(*(x if x is None or name in wide else x.to(dtype) for name, x in named))


def results(function, shape, tokens, dtype=None):
    """Compute the outputs of a form, and the gradients of a random cotangent, by name.

    `shape` has the arguments of the form before the tokens.
    """
    leaves = [None if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in tokens]
    out = dict(zip(("out", "S after", "z after"), function(*shape, type(tokens)(*leaves)), strict=False))
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    d_out = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in out.values()]
    names = [name for name, x in zip(tokens._fields, leaves, strict=True) if x is not None]
    wanted = [x for x in leaves if x is not None]
    return out | dict(zip(names, torch.autograd.grad(list(out.values()), wanted, d_out), strict=True))


def errors(reference, function, make, case):
    """Compute the relative errors of a form against a reference by name, for a case: arguments of `make`."""
    use_tiles(case.get("tiles"))
    *shape, tokens = make(**{name: value for name, value in case.items() if name != "tiles"})
    expected = results(reference, shape, tokens, torch.float64)
    found = results(function, shape, tokens)
    return {name: relative(found[name], x) for name, x in expected.items()}


def relative(found, expected):
    """Compute the relative error in the Frobenius norm."""
    return ((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-12)).item()


def use_tiles(sizes):
    """Set the tile sizes of all kernels, or restore the usual ones with None."""
    from linearize_kernels.triton import common, grouped, sliding_fwd, tuning

    chosen = tuning.tiles if sizes is None else lambda *_: tuning.Tiles(*sizes, warps=4, stages=1)
    for module in (common, grouped, sliding_fwd):
        module.tiles = chosen


def layer(kv_heads=1, **parts):
    """Make a layer with two query heads, whose parameters are moved away from their initial values."""
    from linearize_kernels import Equation, LinearAttention

    geometry = dict(heads=2, kv_heads=kv_heads, key_dim=16, value_dim=16, scale=0.25)
    torch.manual_seed(0)
    attention = LinearAttention(Equation(**geometry, **parts))
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return attention


def bounds(lengths):
    """Compute `cu_seqlens` of sequences."""
    return torch.tensor([0, *lengths]).cumsum(0)


def packed_errors(lengths=LENGTHS, dtype=torch.float32, chunk=16, tiles=None, kv_heads=1, **parts):
    """Compute the relative errors of packed sequences.

    They are those of the outputs and of the gradients of q, k, v and every parameter, in this order.
    """
    from linearize_kernels import varlen

    use_tiles(tiles)
    attention = layer(kv_heads, **parts)
    inputs = [(torch.randn(heads, sum(lengths), 16) + 0.3).to(dtype) for heads in (2, kv_heads, kv_heads)]
    weight = torch.randn(2, sum(lengths), 16).to(dtype)
    found = []
    for impl, wide in (("triton", dtype), ("torch", torch.float64)):
        copied = copy.deepcopy(attention).to(torch.float64 if impl == "torch" else torch.float32)
        copied.impl, leaves = impl, [x.to(wide).requires_grad_() for x in inputs]
        out = varlen(copied, *leaves, bounds(lengths), chunk)
        assert copied.ran == impl
        wanted = [*leaves, *copied.parameters()]
        found.append([out, *torch.autograd.grad(out, wanted, weight.to(wide))])
    return [relative(*pair) for pair in zip(*found, strict=True)]


def leaks(**parts):
    """Measure how the third of five packed sequences and the others affect one another.

    `own` and `joined` are differences that must exist: within the third sequence, and when all five are one
    text.
    """
    from linearize_kernels import varlen

    use_tiles(None)
    attention, lengths = layer(**parts), (5, 18, 19, 2, 17)
    attention.impl = "triton"
    ends = bounds(lengths)
    q, k, v = (torch.randn(heads, sum(lengths), 16).requires_grad_() for heads in (2, 1, 1))
    third = slice(*ends[2:4])
    others = torch.ones(sum(lengths), dtype=torch.bool)
    others[third] = False
    changed = [x.detach().clone() for x in (q, k, v)]
    for x in changed:
        x[:, third] += 1
    out = varlen(attention, q, k, v, ends, 16)
    grads = torch.autograd.grad(out[:, third].square().sum(), (q, k, v))
    with torch.no_grad():
        moved = varlen(attention, *changed, ends, 16) - out
        joined = varlen(attention, *changed, ends[[0, -1]], 16) - varlen(
            attention, q, k, v, ends[[0, -1]], 16
        )
    return dict(
        outputs=moved[:, others].abs().max().item(),
        gradients=max(x[:, others].abs().max().item() for x in grads),
        own=moved[:, third].abs().max().item(),
        joined=joined[:, third.stop :].abs().max().item(),
    )


def layer_errors(**parts):
    """Compute the relative errors of a layer whose chunks Triton computes in fp32.

    A causal layer reads the text in two segments that are no whole chunks.
    """
    from linearize_kernels import bidirectional, chunked

    attention = layer(**parts)
    inputs = [torch.randn(2, heads, 75, 16) + 0.3 for heads in (2, 1, 1)]
    found = {}
    for impl in ("torch", "triton"):
        attention.impl, state, outputs = impl, None, []
        leaves = [x.clone().requires_grad_() for x in inputs]
        if attention.equation.causal:
            for segment in zip(*(x.split((43, 32), -2) for x in leaves), strict=True):
                out, state = chunked(attention, state, *segment, chunk=32)
                outputs.append(out)
            ends = [torch.cat(outputs, -2), state.S, state.z]
        else:
            ends = [bidirectional(attention, *leaves, chunk=32)]
        assert attention.ran == impl
        wanted = [*leaves, *attention.parameters()]
        loss = ends[0].square().sum() + sum(x.sum() for x in ends[1:2])
        found[impl] = [*ends, *torch.autograd.grad(loss, wanted)]
    return [relative(*pair) for pair in zip(found["triton"], found["torch"], strict=True)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    device = sys.argv[1]
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    torch.set_default_device(device)
    from linearize_kernels.torch_forms import grouped, sliding
    from linearize_kernels.triton import forms
    from triton_fused_case import FUSED, fused_errors
    from triton_node_case import NODE_CASES, node_errors

    found = {
        "sliding": {
            name: errors(sliding.sliding, forms.sliding, inputs, case) for name, case in CASES.items()
        },
        "group": {
            name: errors(grouped.grouped, forms.grouped, group_inputs, case)
            for name, case in GROUP_CASES.items()
        },
        "layers": {name: layer_errors(**parts) for name, parts in LAYERS.items()},
        "nodes": {name: node_errors(**case) for name, case in NODE_CASES.items()},
    }
    sys.modules["linearize_kernels.ops.varlen"].SEGMENT = 2  # so that short sequences have several
    found["packed"] = {name: packed_errors(**case) for name, case in PACKED.items()}
    found["leaks"] = {name: leaks(**LAYERS[name]) for name in CAUSAL}
    sys.modules["linearize_kernels.ops.fused"].SEGMENT = 64  # so that short texts have several
    found["fused"] = {name: fused_errors(**case) for name, case in FUSED.items()}
    print(json.dumps(found))
