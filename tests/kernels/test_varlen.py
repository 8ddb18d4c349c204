"""`varlen` where no Triton kernel runs, and the choice between them."""

import pytest
import torch
from linearize_kernels import chunked, varlen
from linearize_kernels.ops.varlen import laid_out, packed_plan
from linearize_kernels.triton.tuning import SEGMENT
from triton_case import CAUSAL, LAYERS, bounds, layer

CPU = torch.device("cpu")


def heads(total, dtype=torch.float32):
    torch.manual_seed(1)
    return [torch.randn(count, total, 16, dtype=dtype) + 0.3 for count in (2, 1, 1)]


@pytest.mark.parametrize("form", CAUSAL)
def test_every_sequence_is_as_alone(form):
    attention, lengths = layer(**LAYERS[form]).double(), (1, 0, 37, 2, 70)
    tokens = heads(sum(lengths), torch.float64)
    out = varlen(attention, *tokens, bounds(lengths))
    alone = [
        chunked(attention, None, *(x[None] for x in own))[0][0]
        for own in zip(*(x.split(lengths, 1) for x in tokens), strict=True)
        if own[0].shape[1]
    ]
    torch.testing.assert_close(out, torch.cat(alone, 1))
    joined = varlen(attention, *tokens, bounds([sum(lengths)]))
    assert (joined - out)[:, 1:].abs().max() > 1e-3


@pytest.mark.parametrize("ends", [[0, 3], [1, 5], [0, 4, 2, 5], [5]])
def test_ends_that_are_none(ends):
    with pytest.raises(ValueError, match="must rise from 0 to the number of tokens, 5"):
        varlen(layer(**LAYERS["sliding"]), *heads(5), torch.tensor(ends))


def test_an_encoder_is_refused():
    with pytest.raises(ValueError, match="ahead"):
        varlen(layer(**LAYERS["encoder"]), *heads(5), bounds([2, 3]))


def test_a_timeline():
    """Chunks of 4 behind 3 slots, 2 sinks: sequences of 1, 4 and 9 chunks and a bit."""
    lengths = (1, 16, 37)
    rows, position, packed = laid_out((0, 1, 17, 54), 4, 3, 2, CPU)
    starts = [0, 4, 20]
    assert rows.tolist() == [start + i for start, n in zip(starts, lengths, strict=True) for i in range(n)]
    assert position.tolist() == [*range(4), *range(16), *range(40)]
    assert packed.begins.tolist() == [5, *[9] * 4, *[25] * 10]
    assert packed.segments.tolist() == [0, 1, 5, 5 + SEGMENT, 15]
    assert packed.firsts.tolist() == [0, 1, 2, 4]
    assert packed.sinks == 2


def test_a_timeline_made_for_inference_serves_training():
    laid_out.cache_clear()
    with torch.inference_mode():
        made = laid_out((0, 5, 11), 4, 3, 2, CPU)
    assert made is laid_out((0, 5, 11), 4, 3, 2, CPU)
    assert not any(x.is_inference() for x in (made.rows, made.position, *made.packed[:3]))


def test_what_triton_runs(monkeypatch):
    pytest.importorskip("triton")
    attention, tokens = layer(**LAYERS["sliding"]), heads(40)

    def chosen(impl, *arguments, **others):
        attention.impl = impl
        return packed_plan(attention, *(arguments or tokens), **others) is not None

    monkeypatch.setattr("linearize_kernels.triton.common.INTERPRETED", True)
    assert chosen("triton", chunk=32) and not chosen("torch", chunk=32)
    assert not chosen("auto", chunk=32)  # on a CPU
    for arguments, others, reason in (
        ((), dict(chunk=48), "not 48"),
        (heads(40, torch.float64), dict(chunk=32), "float64"),
        ((), dict(chunk=32, has_sink_logits=True), "no Triton kernel"),
    ):
        with pytest.raises(ValueError, match=reason):
            chosen("triton", *arguments, **others)
    other = layer(size=20, feature_map="hedgehog", memory="decay")
    assert packed_plan(other, *tokens, chunk=32) is None


def test_triton_is_not_silently_replaced(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr("linearize_kernels.triton.common.INTERPRETED", False)
    for parts, reason in (
        (LAYERS["group"], "CUDA"),
        (dict(size=20, memory="decay", feature_map="relu"), "no Triton"),
    ):
        attention = layer(**parts)
        attention.impl = "triton"
        with pytest.raises(ValueError, match=reason):
            varlen(attention, *heads(40), bounds((15, 25)))
