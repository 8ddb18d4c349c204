"""The check `long`: one long prefill against the same tokens in chunks of odd lengths, the last ones single.

The kernels compute a long prefill in segments (a fixed number of tokens), with a state carried between them.
"""

from collections.abc import Iterator
from itertools import cycle

import torch
from linearize_kernels.ops.backend import form_of, segment_tokens
from torch import nn
from transformers import DynamicCache

from linearize_cli.metrics.equivalence import Comparison
from linearize_cli.models.decoding import Decoder
from linearize_cli.models.positions import reach
from linearize_cli.models.tasks import CausalLM
from linearize_cli.verification.check import Finding, Subject, compared, not_checked
from linearize_cli.verification.definition import causal_layers, layer_inputs

SINGLE = 16  # the last tokens are fed one at a time
CHUNKS = (1031, 64, 1, 613, 257, 2049, 7)  # tokens of the chunks before them, repeated in a cycle
SEGMENT = 4_096  # tokens; a layer is compared over 2.5 times as many
TOKENS = 5_300  # tokens of the row for the whole model, well beyond position 2,048


def long(subject: Subject) -> Finding:
    """Compare a long prefill with chunks and single tokens: of the whole model, and of one layer of each
    distinct equation.

    The layer's row has 2.5 segments. Kernels compute a long prefill segment by segment.
    """
    if not isinstance(subject.task, CausalLM):
        return not_checked("long", f"{subject.task.kind} is not a causal language model")
    worst = subject.comparison()
    length = min(TOKENS, reach(subject.model) or TOKENS)
    compare_model(subject, length, worst)
    layers = {x.equation: x for x in causal_layers(subject)}
    segments = max(compare_layer(subject, attention, worst) for attention in layers.values())
    data = {"long": {"max_abs_diff": worst.diff, "tokens": length, "layer_tokens": segments}}
    said = f" at {length:,} tokens; layers at {segments:,}"
    return compared("long", worst.diff, worst.limit, data, said)


def compare_model(subject: Subject, length: int, worst: Comparison) -> None:
    """Read a long row by one prefill, and again in chunks followed by single tokens, and compare the model's
    logits.

    The prefill runs once with and once without a cache.

    Args:
        length: the number of tokens.
        worst: collects the differences.
    """
    decoder, ids = Decoder(subject.model), subject.random_tokens(1, length)
    cache = decoder.new_cache()
    for chunk in ids.split(list(chunk_lengths(length)), 1):
        last = decoder.begin(chunk, cache)[:, -1]
    worst.add(last, decoder.begin(ids, decoder.new_cache())[:, -1])
    worst.add(last, decoder.begin(ids, None)[:, -1])


def chunk_lengths(length: int) -> Iterator[int]:
    """Yield the lengths of chunks that add up to `length`. The last 16 chunks are single tokens."""
    left = length - SINGLE
    for chunk in cycle(CHUNKS):
        if left <= 0:
            break
        yield min(chunk, left)
        left -= chunk
    yield from [1] * min(SINGLE, length)


@torch.inference_mode()
def compare_layer(subject: Subject, attention: nn.Module, worst: Comparison) -> int:
    """Compare a prefill of one layer with chunks followed by single tokens: its outputs and its final state.

    The row has 2.5 segments, the pieces in which kernels compute a prefill. It is sampled from the q, k and v
    that the layer receives.

    Args:
        attention: the layer.
        worst: collects the differences.

    Returns:
        The length of the row in tokens.
    """
    q, k, v = layer_inputs(subject, attention)
    segment = max(SEGMENT, segment_tokens(form_of(attention, 0, 1 << 20, False), q))
    length = 2 * segment + segment // 2 + 5
    sampled = torch.randint(q.shape[-2], (length,), generator=subject.generator()).to(q.device)
    whole = [x[..., sampled, :] for x in (q, k, v)]
    parts = zip(*(x.split(list(chunk_lengths(length)), -2) for x in whole), strict=True)
    own, layer = Comparison(worst.tolerance, 0.0), attention.place(DynamicCache(), 0)
    out = torch.cat([attention(*part, None, layer) for part in parts], 1)[:, -SINGLE:]
    again = attention.place(DynamicCache(), 0)
    for expected in (attention(*whole, None, again), attention(*whole, None)):
        own.add(out, expected[:, -SINGLE:])
    for name, expected in vars(again.state).items():
        actual = getattr(layer.state, name)
        if not expected.numel():
            continue
        if expected.is_floating_point():  # sums grow with the length of the row
            scale = expected.abs().max().clamp_min(1.0)
            actual, expected = actual / scale, expected / scale
        own.add(actual, expected)
    worst.include(own)
    return length
