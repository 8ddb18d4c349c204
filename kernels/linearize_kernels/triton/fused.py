"""Device functions and launchers that both fused forward kernels share: loading tokens, features, and sums by segment.

The kernels read q, k and v where the model's projections wrote them, in any layout, and compute features, key weights
and masks themselves. In memory they keep only features (the group form only Hedgehog's), logits, and the sums S and z
before each segment. A segment is SPAN chunks that follow one another, and one program works through it. `common`
explains the names in capitals.

A slot is the place of one token's key and value, as in `torch_forms.chunks`: slot s holds the new token `s - lead`.
Tokens below 0 are those of `recent_k` and `recent_v`, the last R of a state. Slots below `skip` are empty, hold
attention sinks, or stand for tokens that are in S already.
"""

from typing import Any

import torch
from torch import Tensor

from linearize_kernels.parts.far import CEILING
from linearize_kernels.triton.common import INTERPRETED, WIDTH, carry, dot, load_tile, store_tile
from linearize_kernels.triton.fused_inputs import Features, Heads, Place, Window
from linearize_kernels.triton.sliding_fwd import load_vector, sink_scores
from linearize_kernels.triton.tuning import capability, padded

try:  # transformers' loader of remote code requires every package that is imported outside a `try`
    import triton
    import triton.language as tl
except ImportError:
    raise

VALUES = 64  # dimensions of the values that a program works on
ROWS = 64  # tokens that a program of `write_features` works on
WEIGHT_CEILING, EPS = tl.constexpr(CEILING), tl.constexpr(torch.finfo(torch.float32).eps)


@triton.jit
def load_tokens(
    x, recent, first, length, stride, column, WIDTH: tl.constexpr, ROWS: tl.constexpr, R: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Load ROWS tokens of one head, from token `first` on, which may be negative. Missing ones are zero.

    Args:
        x: the new tokens of the head, `[length, WIDTH]`, `stride` elements apart.
        recent: the tokens before them, `[R, WIDTH]`, or None.
    """
    i = tl.arange(0, ROWS)
    inside = (column < WIDTH)[None, :]
    new = (first + i >= 0) & (first + i < length)
    x += tl.cast(first, tl.int64) * stride
    out = tl.load(x + i[:, None] * stride + column[None, :], mask=new[:, None] & inside, other=0.0)
    if UPCAST:
        out = out.to(tl.float32)
    if recent is not None:
        old = (first + i < 0) & (first + i >= -R)
        pointers = recent + (first + R) * WIDTH + i[:, None] * WIDTH + column[None, :]
        before = tl.load(pointers, mask=old[:, None] & inside, other=0.0)
        if UPCAST:
            before = before.to(tl.float32)
        out = tl.where(old[:, None], before, out)
    return out


@triton.jit
def softmax(x, present):
    """Compute the softmax over the columns that are present. The others are zero."""
    x = tl.where(present, x, float("-inf"))
    x = tl.exp(x - tl.max(x, 1)[:, None])
    return x / tl.sum(x, 1)[:, None]


@triton.jit
def unit(x):
    """Compute `x / |x|` for each row, in the dtype of x. Zero rows stay zero."""
    wide = x.to(tl.float32)
    return (wide / tl.maximum(tl.sqrt(tl.sum(wide * wide, 1)), EPS)[:, None]).to(x.dtype)


@triton.jit
def features(x, column, D: tl.constexpr, MAP: tl.constexpr):
    """Compute the features of the rows of x, in its dtype, by a map that has no parameters."""
    if MAP == "identity":
        phi = unit(x)
    elif MAP == "elu":
        wide = x.to(tl.float32)
        phi = tl.where(wide > 0, 1 + wide, tl.exp(tl.minimum(wide, 0.0)))
        phi = tl.where((column < D)[None, :], phi, 0.0).to(x.dtype)
    else:
        tl.static_assert(MAP == "relu")
        phi = tl.maximum(x.to(tl.float32), 0.0).to(x.dtype)
    return phi


@triton.jit
def affine(x, weight, column, D: tl.constexpr):
    """Compute `w · x + b` for each row in fp32.

    Args:
        weight: `[D + 1]`, w and then b.
    """
    w = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    return tl.sum(x.to(tl.float32) * w[None, :], 1) + tl.load(weight + D).to(tl.float32)


@triton.jit
def key_factors(k, key_weight, present, column, D: tl.constexpr):
    """Compute the weight ω(k) of each key (see `far.FeatureMemory`), which is zero for those that are not present."""
    factor = present.to(tl.float32)
    if key_weight is not None:
        x = affine(k, key_weight, column, D) / WEIGHT_CEILING
        capped = 1 - 2 / (1 + tl.exp(2 * x))  # tanh
        factor = tl.where(present, tl.exp(capped * WEIGHT_CEILING), 0.0)
    return factor


@triton.jit
def key_features(
    k, phi, slot, slots, present, key_weight, column, f, D: tl.constexpr, F: tl.constexpr, MAP: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute the weighted features ω(k) φ(k) of keys in the dtype of k, zero where not `present`.

    With MAP "given" they are loaded.

    Args:
        k: the keys, `[rows, BD]`.
        phi: `[slots, F]`, the weighted features of all slots of the head, or None.
        slot: the keys' slots.
    """
    if MAP == "given":
        out = load_tile(phi, tl.where(present, slot, slots), slots, f, F, UPCAST)
    else:
        factor = key_factors(k, key_weight, present, column, D)
        out = (features(k, column, D, MAP).to(tl.float32) * factor[:, None]).to(k.dtype)
    return out


@triton.jit(do_not_specialize=("skip", "lead", "start"))
def write_features(
    x, recent, weight, key_weight, out, logits, mix, sinks, length, slots, skip, lead, start, scale, x_row, x_head,
    x_token, sink_row, sink_head, sink_token, MAPS: tl.constexpr, HEADS: tl.constexpr, R: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, MAP: tl.constexpr, SIZE: tl.constexpr, SINKS: tl.constexpr, KV: tl.constexpr,
    BD: tl.constexpr, BF: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute the features of queries or keys, times ω(x) for keys. For the queries of the sliding form, compute the
    logits of the linear part and of the sinks, too.

    Hedgehog's features are `[softmax(x W), softmax(-x W)]`. The other maps have no W, and D features.

    Args:
        x, recent: `[B, HEADS, length, D]`, and the tokens before them `[B, HEADS, R, D]` or None.
        weight: Hedgehog's W, `[MAPS, D, HALF]`, or None.
        key_weight: w and b of ω, `[MAPS, D + 1]`, or None.
        out: `[B MAPS, slots, F]`, is written. Slots below `skip` are zero.
        logits: `[B MAPS, 1 + SINKS, length]`, is written, or None: the logit of the linear part, and the scores of the
            sinks. They are -inf for rows without far tokens, and for rows before the sink.
        mix: `[MAPS, D + 1]`, the weights of the linear part's logit, or None for a logit of 0.
        sinks: the sinks' keys, `[B, KV, SINKS, D]`.
        lead: the slot of the first new token.
        start: the position of row 0.
    """
    state_head, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * BM
    batch, head = state_head // MAPS, state_head % MAPS
    x_index = head // (MAPS // HEADS)
    d, f, slot = tl.arange(0, BD), tl.arange(0, BF), first + tl.arange(0, BM)
    if recent is not None:
        recent += (batch * HEADS + x_index) * R * D
    x += batch * x_row + x_index * x_head
    tile = load_tokens(x, recent, first - lead, length, x_token, d, D, BM, R, UPCAST)
    if key_weight is not None:
        key_weight += head * (D + 1)
    if logits is not None:
        logits += state_head * (1 + SINKS) * length + slot
        logit = tl.zeros((BM,), tl.float32)
        if mix is not None:
            logit = affine(tile, mix + head * (D + 1), d, D)
        tl.store(logits, tl.where(start + slot >= SINKS + SIZE, logit, float("-inf")), mask=slot < length)
        sinks += batch * sink_row + head // (MAPS // KV) * sink_head
        for sink in range(SINKS):
            key = load_vector(sinks + sink * sink_token, d, D)
            score = sink_scores(tile, key, start + slot, sink, scale)
            tl.store(logits + (1 + sink) * length, score, mask=slot < length)
    factor = key_factors(tile, key_weight, slot >= skip, d, D)[:, None]
    inside = (slot < slots)[:, None]
    if MAP == "hedgehog":
        present = (f < HALF)[None, :]
        y = tl.zeros((BM, BF), tl.float32)
        for first_d in range(0, D, BK):  # in parts, because sm_80 holds all of W in registers otherwise
            part = first_d + tl.arange(0, BK)
            some = load_tokens(x, recent, first - lead, length, x_token, part, D, BM, R, UPCAST)
            pointers = weight + head * D * HALF + part[:, None] * HALF + f[None, :]
            w = tl.load(pointers, mask=(part < D)[:, None] & present, other=0.0)
            high = w.to(some.dtype)
            y += dot(some, high)
            if w.dtype != some.dtype:  # W has more bits than x: add the product of the rest
                y += dot(some, (w - high.to(tl.float32)).to(some.dtype))
        pointers = out + state_head * slots * 2 * HALF + slot[:, None] * (2 * HALF) + f[None, :]
        tl.store(pointers, (softmax(y, present) * factor).to(out.dtype.element_ty), mask=inside & present)
        tl.store(
            pointers + HALF, (softmax(-y, present) * factor).to(out.dtype.element_ty), mask=inside & present
        )
    else:
        phi = features(tile, d, D, MAP).to(tl.float32) * factor
        store_tile(out + state_head * slots * D, phi, slot, slots, d, D)


@triton.jit(do_not_specialize=("skip", "cut", "lead"))
def segment_sums(
    k, v, recent_k, recent_v, phi_k, key_weight, S, z, length, slots, skip, lead, cut, k_row, k_head, k_token,
    v_row, v_head, v_token, SPAN: tl.constexpr, C: tl.constexpr, R: tl.constexpr, KV: tl.constexpr,
    FAR: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, F: tl.constexpr, MAP: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr, BS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute the sums of `φ(k) vᵀ` and of φ(k) over the slots of each segment, in fp32.

    The last program of each head sums the slots from the last whole segment below `cut` up to `cut`.

    Args:
        k, recent_k: None if the features are given.
        phi_k: `[B FAR, slots, F]`, the weighted features of all slots, or None if MAP computes them.
        S, z: `[B FAR, segments + 1, F, Dv]` and `[B FAR, segments + 1, F]`, are written.
        length: the number of new tokens.
        k_row, k_head, k_token, v_row, v_head, v_token: the strides of k and v.
    """
    state_head, segment = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    batch, head = state_head // FAR, state_head % FAR
    kv_head = head // (FAR // KV)
    d, f, e = tl.arange(0, BD), tl.arange(0, BF), tl.program_id(2) * BV + tl.arange(0, BV)
    begin = tl.program_id(1) * SPAN * C
    end = begin + SPAN * C
    if segment == tl.num_programs(1) - 1:
        begin = cut // (SPAN * C) * (SPAN * C)
        end = cut
    v += batch * v_row + kv_head * v_head
    if recent_v is not None:
        recent_v += (batch * KV + kv_head) * R * DV
    if MAP == "given":
        phi_k += state_head * slots * F
    else:
        k += batch * k_row + kv_head * k_head
        if recent_k is not None:
            recent_k += (batch * KV + kv_head) * R * D
    if key_weight is not None:
        key_weight += head * (D + 1)
    total = tl.zeros((BF, BV), tl.float32)
    mass = tl.zeros((BF,), tl.float32)
    for step in range(0, tl.cdiv(end - begin, BS)):
        slot = begin + step * BS
        values = load_tokens(v, recent_v, slot - lead, length, v_token, e, DV, BS, R, UPCAST)
        keys = values
        if MAP != "given":
            keys = load_tokens(k, recent_k, slot - lead, length, k_token, d, D, BS, R, UPCAST)
        i = slot + tl.arange(0, BS)
        present = (i >= skip) & (i < end) & (i - lead < length)
        phi = key_features(keys, phi_k, i, slots, present, key_weight, d, f, D, F, MAP, UPCAST)
        mass += tl.sum(phi.to(tl.float32), 0)
        total += dot(tl.trans(phi), values)
    index = state_head * tl.num_programs(1) + segment
    store_tile(S + index * F * DV, total, f, F, e, DV)
    tl.store(z + index * F + f, mass, mask=f < F)


@triton.jit
def read_sums(phi, S, z, WIDE: tl.constexpr):
    """Compute `φ S` and `φ z` of some rows. The product with S is in bfloat16, because S overflows fp16. With
    WIDE it is in fp32.
    """
    mass = tl.sum(phi.to(tl.float32) * z[None, :], 1)
    if not WIDE:
        phi, S = phi.to(tl.bfloat16), S.to(tl.bfloat16)
    return dot(phi, S), mass


def constants(heads: Heads, phi: Features, far_heads: int, place: Place, values: int) -> dict[str, Any]:
    """Return the compile-time arguments that the kernels share, by name.

    Args:
        far_heads: the number of heads of S.
        values: the most dimensions of the values in a program.
    """
    key_dim, value_dim = heads.q.shape[-1], heads.v.shape[-1]
    width = key_dim if phi.k is None else phi.k.shape[-1]
    return dict(
        SPAN=place.span,
        C=place.chunk,
        R=place.recent,
        KV=heads.k.shape[1],
        FAR=far_heads,
        D=key_dim,
        DV=value_dim,
        F=width,
        MAP=phi.name,
        BD=padded(key_dim),
        BV=min(values, padded(value_dim)),
        BF=padded(width),
        UPCAST=INTERPRETED,
        num_warps=8,
        num_stages=1,
    )


def few_values(q: Tensor) -> int:
    """Return the dimensions of the values that a program works on in the kernels that keep S in registers."""
    return VALUES if capability(q.device) > 8 else VALUES // 2


def strides(*tensors: Tensor) -> tuple[int, ...]:
    """Return the strides of tensors `[B, heads, T, X]`, without the last one, which is 1."""
    return tuple(step for x in tensors for step in x.stride()[:-1])


def given_features(
    heads: Heads, name: str, weights: tuple[Tensor | None, Tensor | None], key_weight: Tensor | None, far_heads: int,
    place: Place, window: Window | None = None,
) -> tuple[Features, Tensor | None]:  # fmt: skip
    """Compute the features of all queries and keys, and the logits of the sliding form.

    Args:
        name: the feature map, "hedgehog", "identity", "elu" or "relu".
        weights: Hedgehog's W of queries and of keys, `[heads, D, X]` and `[far, D, X]`, or None twice.
        key_weight: w and b of ω, `[far, D + 1]`, or None.
        far_heads: the number of heads of S.
        window: the window and sinks of the sliding form, or None.

    Returns:
        The features, and the logits `[B heads, 1 + sinks, T]` of the linear part and of the sinks (None without a
        window).
    """
    q, k = heads.q, heads.k
    length, dim = q.shape[2:]
    kv, half = k.shape[1], dim if weights[0] is None else weights[0].shape[-1]
    logits, mix, sinks, size, start, scale, count = None, None, None, 0, 0, 1.0, 0
    sink_strides: tuple[int, ...] = (0, 0, 0)
    if window is not None:
        size, scale, start, mix, sinks, _ = window
        count, sink_strides = sinks.shape[2], strides(sinks)
        logits = q.new_empty(len(q) * q.shape[1], 1 + count, length, dtype=torch.float32)
    made = []
    for x, recent, maps, weight, own, skip, lead, extra in (
        (q, None, q.shape[1], weights[0], None, 0, 0, (logits, mix, sinks)),
        (k, heads.recent_k, far_heads, weights[1], key_weight, place.skip, place.lead, (None, None, None)),
    ):
        slots = lead + length
        out = x.new_empty(len(x) * maps, slots, 2 * half if name == "hedgehog" else half)
        write_features[(len(out), triton.cdiv(slots, ROWS))](
            x, recent, weight, own, out, *extra, length, slots, skip, lead, start, scale, *strides(x), *sink_strides,
            MAPS=maps, HEADS=x.shape[1], R=place.recent, D=dim, HALF=half, MAP=name, SIZE=size, SINKS=count, KV=kv,
            BD=padded(dim), BF=padded(half), BM=ROWS, BK=min(32, padded(dim)), UPCAST=INTERPRETED, num_warps=8,
            num_stages=1,
        )  # fmt: skip
        made.append(out)
    phi_q, phi_k = made
    return Features("given", phi_q, phi_k, None), logits


def sums(heads: Heads, phi: Features, far_heads: int, place: Place) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute S and z before each segment, and after the text.

    Args:
        far_heads: the number of heads of S.

    Returns:
        S `[B far, segments + 1, F, Dv]` and z `[B far, segments + 1, F]`, the sums before each segment. The last entry
        of each head holds a part of a segment. Then S `[B, far, F, Dv]` and z `[B, far, F]` after the text.
    """
    q, k, v, recent_k, recent_v, S, z = heads
    read_k, read_recent_k = (k, recent_k) if phi.k is None else (None, None)
    options = constants(heads, phi, far_heads, place, VALUES)
    length, count, places = q.shape[2], len(q) * far_heads, place.segments + 1
    before_S = q.new_empty(count, places, options["F"], v.shape[-1], dtype=torch.float32)
    before_z = before_S.new_empty(before_S.shape[:-1])
    segment_sums[(count, places, triton.cdiv(v.shape[-1], options["BV"]))](
        read_k, v, read_recent_k, recent_v, phi.k, phi.key_weight, before_S, before_z, length, place.lead + length,
        place.skip, place.lead, place.cut, *strides(k, v), BS=64, **options | dict(num_stages=2),
    )  # fmt: skip
    after = []
    for total, initial in ((before_S, S), (before_z, z)):
        after.append(total.new_empty(len(q), far_heads, *total.shape[2:]))
        size, whole = total[0, 0].numel(), place.cut // place.segment
        carry[(count, 1, triton.cdiv(size, WIDTH))](
            total, after[-1], None, initial, places, whole, SIZE=size, REVERSE=False, WIDTH=WIDTH, num_warps=4,
            num_stages=2,
        )  # fmt: skip
    S_after, z_after = after
    return before_S, before_z, S_after, z_after
