"""Long sequences: a prefill of several segments against pieces of odd lengths and single tokens at its end."""

from collections.abc import Iterator
from itertools import cycle

import torch
from linearize_kernels.ops.blocked import segment_of, tokens_at_once
from torch import Tensor, nn
from transformers import DynamicCache

from linearize_cli.metrics.equivalence import Comparison
from linearize_cli.models.decoding import Decoder
from linearize_cli.models.tasks import CausalLM, reach
from linearize_cli.verification.check import Finding, Subject, compared, not_checked
from linearize_cli.verification.definition import causal_layers

SINGLE = 16  # tokens that come one by one at the end
PIECES = (1031, 64, 1, 613, 257, 2049, 7)  # tokens of the pieces before them, taken in turns
TOKENS = 5_300  # of the whole model: positions beyond 2,048, and 2.5 times as many


def long(subject: Subject) -> Finding:
    """Compare the last tokens of a long row by the whole model, and of 2.5 segments by a layer of each kind."""
    if not isinstance(subject.task, CausalLM):
        return not_checked("long", f"{subject.task.kind} has no long text of its own")
    worst = subject.comparison()
    length = min(TOKENS, reach(subject.model) or TOKENS)
    compare_model(subject, length, worst)
    layers = {x.equation: x for x in causal_layers(subject)}
    segments = max(compare_layer(subject, attention, worst) for attention in layers.values())
    data = {"long": {"max_abs_diff": worst.diff, "tokens": length, "layer_tokens": segments}}
    said = f" at {length:,} tokens; layers at {segments:,}"
    return compared("long", worst.diff, worst.limit, data, said)


def compare_model(subject: Subject, length: int, worst: Comparison) -> None:
    """The whole model: one prefill, with and without a cache, against pieces and single tokens."""
    decoder, ids = Decoder(subject.model), subject.random_tokens(1, length)
    cache = decoder.new_cache()
    for piece in ids.split(list(pieces(length)), 1):
        last = decoder.begin(piece, cache)[:, -1]
    worst.add(last, decoder.begin(ids, decoder.new_cache())[:, -1])
    worst.add(last, decoder.begin(ids, None)[:, -1])


def pieces(length: int) -> Iterator[int]:
    """Yield the lengths of pieces that make up a row, the last of them single tokens."""
    left = length - SINGLE
    for piece in cycle(PIECES):
        if left <= 0:
            break
        yield min(piece, left)
        left -= piece
    yield from [1] * min(SINGLE, length)


@torch.inference_mode()
def compare_layer(subject: Subject, attention: nn.Module, worst: Comparison) -> int:
    """One layer, on q, k and v as it sees them, over 2.5 segments of its implementation.

    Returns:
        The tokens of the row.
    """
    q, k, v = inputs_of(subject, attention)
    segment = tokens_at_once(segment_of(attention, 0, 1 << 20, False), q)
    length = 2 * segment + segment // 2 + 5
    drawn = torch.randint(q.shape[-2], (length,), generator=subject.generator()).to(q.device)
    whole = [x[..., drawn, :] for x in (q, k, v)]
    parts = zip(*(x.split(list(pieces(length)), -2) for x in whole), strict=True)
    own, layer = Comparison(worst.tolerance, 0.0), attention.place(DynamicCache(), 0)
    out = torch.cat([attention(*part, None, layer) for part in parts], 1)[:, -SINGLE:]
    again = attention.place(DynamicCache(), 0)
    for expected in (attention(*whole, None, again), attention(*whole, None)):
        own.add(out, expected[:, -SINGLE:])
    for name, expected in vars(again.state).items():
        actual = getattr(layer.state, name)
        if not expected.numel():
            continue
        if expected.is_floating_point():  # sums are as large as the row is long
            scale = expected.abs().max().clamp_min(1.0)
            actual, expected = actual / scale, expected / scale
        own.add(actual, expected)
    worst.include(own)
    return length


def inputs_of(subject: Subject, attention: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v `[1, heads, T, D]` as the layer sees them in the rows."""
    seen: list[tuple[Tensor, ...]] = []
    hook = attention.register_forward_pre_hook(lambda module, args: seen.append(args[:3]))
    try:
        subject.task.read(subject.model, list(subject.rows))
    finally:
        hook.remove()
    q, k, v = (x.transpose(0, 1).flatten(1, 2)[None] for x in seen[0])
    return q, k, v
