"""The least time that a form of attention can take: its bytes at the device's bandwidth, or its FLOPs at its peak."""

from typing import NamedTuple

import torch
from linearize_kernels import LinearAttention

from linearize_cli.metrics.timing import interleaved

FORWARD, BOTH, DECODE = "forward", "forward + backward", "decode"
GPU_COPY, CPU_COPY = 1 << 30, 1 << 27  # bytes that are copied: far more than a cache holds
GPU_WIDTH, CPU_WIDTH = 8192, 1024  # of the square matrices that are multiplied


class Work(NamedTuple):
    """FLOPs, a multiply-add being two, and bytes that must go to or come from memory."""

    flops: float
    bytes: float


class Sizes(NamedTuple):
    """batch, heads and tokens T (decode: that were read before), numbers D of a head and their dtype."""

    batch: int
    heads: int
    tokens: int
    dim: int
    dtype: torch.dtype

    @property
    def item(self) -> int:
        return self.dtype.itemsize

    @property
    def lanes(self) -> int:
        return self.batch * self.heads


class Rates(NamedTuple):
    """What a device does: bytes/s of a copy, read and written, and FLOP/s of a product of matrices."""

    bandwidth: float
    peak: float

    def floor(self, work: Work) -> float:
        """Seconds."""
        return max(work.bytes / self.bandwidth, work.flops / self.peak)


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Of the fastest of several runs, in a dtype."""
    size, width = (GPU_COPY, GPU_WIDTH) if device.type == "cuda" else (CPU_COPY, CPU_WIDTH)
    source = torch.zeros(size // dtype.itemsize, dtype=dtype, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    ways = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
    seconds = {name: min(found) for name, found in interleaved(ways, device, 12, 5.0).items()}
    return Rates(2 * source.nbytes / seconds["copy"], 2 * width**3 / seconds["product"])


def streams(sizes: Sizes, phase: str) -> int:
    """Bytes that any attention takes in and gives out: q, k, v and o; in the backward q, k, v and the gradients of
    all four; of a decoded token, those of one.
    """
    tokens = 1 if phase == DECODE else sizes.tokens
    return (11 if phase == BOTH else 4) * sizes.lanes * tokens * sizes.dim * sizes.item


def softmax_work(sizes: Sizes, phase: str) -> Work:
    """Of each of T (T + 1) / 2 causal pairs a score and a weighted value, D multiply-adds each, and in a backward
    that makes the scores again five such products more (FlashAttention, arXiv 2205.14135). A decoded token meets T
    keys and values and reads them all.
    """
    length = sizes.tokens
    pairs = length if phase == DECODE else length * (length + 1) / 2
    products = 7 if phase == BOTH else 2
    cached = 2 * sizes.lanes * length * sizes.dim * sizes.item if phase == DECODE else 0
    return Work(2 * products * sizes.dim * pairs * sizes.lanes, streams(sizes, phase) + cached)


def recurrent_work(sizes: Sizes, phase: str, flops: float, read: int, written: int) -> Work:
    """Of a form that takes so many FLOPs a token and head, and twice as many more in its backward, whatever the
    context; a decoded token reads and writes so many bytes of state.
    """
    tokens = 1 if phase == DECODE else sizes.tokens
    total = (3 if phase == BOTH else 1) * flops * tokens * sizes.lanes
    return Work(total, streams(sizes, phase) + (read + written if phase == DECODE else 0))


def linear_work(attention: LinearAttention, sizes: Sizes, phase: str) -> Work:
    """Our equation, token by token. Of a token and head: 4 D for the score and the value of each near token and sink;
    2 F D to add it to S, 2 F (D + 1) to read S and z; 2 for each learned number of the feature maps and of the combine;
    2 W D for a conv of W taps. A decoded token reads the whole state and the learned numbers, and writes S and z.
    """
    eq = attention.equation
    features = 0 if attention.far is None else attention.far.state_width[0]
    parts = [part for part in (attention.far, attention.combine) if part is not None]
    learned = sum(p.numel() for part in parts for p in part.parameters()) / eq.heads
    near = near_tokens(eq.scope, eq.size, sizes.tokens, phase) + eq.sinks
    flops = 4 * sizes.dim * near + 2 * features * (2 * sizes.dim + 1) + 2 * learned
    flops += 2 * eq.conv_width * sizes.dim
    state = attention.empty_state(sizes.batch, "meta", sizes.dtype)
    read = state.nbytes() + sum(p.nbytes for p in attention.parameters())
    return recurrent_work(sizes, phase, flops, read, state.S.nbytes + state.z.nbytes)


def near_tokens(scope: str, size: int, length: int, phase: str) -> float:
    """Tokens of the window or group that a token sees, itself among them: on average of T in a row, or the next."""
    position = torch.arange(length, length + 1) if phase == DECODE else torch.arange(length)
    seen = position % size + 1 if scope == "group" else (position + 1).clamp(max=size)
    return seen.double().mean().item()


def simple_gla_work(sizes: Sizes, phase: str) -> Work:
    """A decay per head and token (GLA, arXiv 2312.06635; Mamba-2, arXiv 2405.21060): D² to decay S, 2 D² to add a
    token, 2 D² to read it; S in fp32.
    """
    state = 4 * sizes.lanes * sizes.dim**2
    return recurrent_work(sizes, phase, 5 * sizes.dim**2, state, state)


def gated_delta_work(sizes: Sizes, phase: str) -> Work:
    """The gated delta rule (arXiv 2412.06464): as `simple_gla_work`, and 2 D² to read what S holds for the key."""
    state = 4 * sizes.lanes * sizes.dim**2
    return recurrent_work(sizes, phase, 7 * sizes.dim**2, state, state)
