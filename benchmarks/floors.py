"""Lower bounds (roofline) on the time of attention: bytes at the device's bandwidth, or FLOPs at its peak."""

from typing import NamedTuple

import torch
from linearize_kernels import LinearAttention

from linearize_cli.metrics.timing import interleaved

FORWARD, BOTH, DECODE = "forward", "forward + backward", "decode"
GPU_COPY, CPU_COPY = 1 << 30, 1 << 27  # bytes of the copy, far more than a cache holds
GPU_WIDTH, CPU_WIDTH = 8192, 1024  # width of the square matrices in the product


class Work(NamedTuple):
    """FLOPs (a multiply-add counts as two), and bytes that must be read from or written to memory."""

    flops: float
    bytes: float


class Sizes(NamedTuple):
    """Sizes of an attention layer's inputs.

    Attributes:
        batch: rows in the batch.
        heads: number of heads.
        tokens: T, the length of a row. For decoding, the number of earlier tokens.
        dim: D, the size of a head.
    """

    batch: int
    heads: int
    tokens: int
    dim: int
    dtype: torch.dtype

    @property
    def item(self) -> int:
        """Return the bytes of one number."""
        return self.dtype.itemsize

    @property
    def rows(self) -> int:
        """Return batch x heads, the number of independent sequences."""
        return self.batch * self.heads


class Rates(NamedTuple):
    """The measured speed of a device: bytes/s of a copy (reads plus writes), and FLOP/s of a matrix product."""

    bandwidth: float
    peak: float

    def floor(self, work: Work) -> float:
        """Return the least seconds that some work can take."""
        return max(work.bytes / self.bandwidth, work.flops / self.peak)


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measure how fast a device copies memory (bytes/s) and multiplies matrices (FLOP/s) in a dtype.

    The fastest of several runs counts.
    """
    size, width = (GPU_COPY, GPU_WIDTH) if device.type == "cuda" else (CPU_COPY, CPU_WIDTH)
    source = torch.zeros(size // dtype.itemsize, dtype=dtype, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    ways = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
    seconds = {name: min(found) for name, found in interleaved(ways, device, 12, 5.0).items()}
    return Rates(2 * source.nbytes / seconds["copy"], 2 * width**3 / seconds["product"])


def input_output_bytes(sizes: Sizes, phase: str) -> int:
    """Return the bytes of inputs and outputs that any form of attention must read and write.

    A forward has q, k, v and o. A backward adds q, k, v and the gradients of all four. Decoding has one token.
    """
    tokens = 1 if phase == DECODE else sizes.tokens
    return (11 if phase == BOTH else 4) * sizes.rows * tokens * sizes.dim * sizes.item


def softmax_work(sizes: Sizes, phase: str) -> Work:
    """Return the FLOPs and bytes of softmax attention.

    Each of the T (T + 1) / 2 causal pairs takes a score and a weighted value, D multiply-adds each. A
    backward that recomputes the scores takes five more such products (FlashAttention, arXiv 2205.14135). A
    decoded token attends to T keys and values and reads them all.
    """
    length = sizes.tokens
    pairs = length if phase == DECODE else length * (length + 1) / 2
    products = 7 if phase == BOTH else 2
    cached = 2 * sizes.rows * length * sizes.dim * sizes.item if phase == DECODE else 0
    return Work(2 * products * sizes.dim * pairs * sizes.rows, input_output_bytes(sizes, phase) + cached)


def recurrent_work(sizes: Sizes, phase: str, flops: float, read: int, written: int) -> Work:
    """Return the FLOPs and bytes of a recurrent attention, whose cost per token does not depend on the
    context.

    Args:
        flops: FLOPs per token and head in the forward. A backward takes twice as many more.
        read: bytes of state that a decoded token reads.
        written: bytes of state that a decoded token writes.
    """
    tokens = 1 if phase == DECODE else sizes.tokens
    total = (3 if phase == BOTH else 1) * flops * tokens * sizes.rows
    state = read + written if phase == DECODE else 0
    return Work(total, input_output_bytes(sizes, phase) + state)


def linear_work(attention: LinearAttention, sizes: Sizes, phase: str) -> Work:
    """Return the FLOPs and bytes of linearize's attention, computed token by token.

    FLOPs per token and head, with F features:

    - 4 D for the score and the value of each token in the window or group, and of each sink,
    - 2 F D to add the token to S, and 2 F (D + 1) to read S and z,
    - 2 for each parameter of the feature maps and of the combine,
    - 2 W D for a conv of W taps.

    A decoded token reads the whole state and all parameters, and writes S and z.
    """
    eq = attention.equation
    features = 0 if attention.far is None else attention.far.state_width[0]
    parts = [part for part in (attention.far, attention.combine) if part is not None]
    parameters = sum(p.numel() for part in parts for p in part.parameters()) / eq.heads
    local = local_tokens(eq.scope, eq.size, sizes.tokens, phase) + eq.sinks
    flops = 4 * sizes.dim * local + 2 * features * (2 * sizes.dim + 1) + 2 * parameters
    flops += 2 * eq.conv_width * sizes.dim
    state = attention.empty_state(sizes.batch, "meta", sizes.dtype)
    read = state.nbytes() + sum(p.nbytes for p in attention.parameters())
    return recurrent_work(sizes, phase, flops, read, state.S.nbytes + state.z.nbytes)


def local_tokens(scope: str, size: int, length: int, phase: str) -> float:
    """Return how many tokens of its window or group a token attends to, including itself.

    It is the mean over a row of `length` tokens. For decoding, it is that of the next token after the row.
    """
    position = torch.arange(length, length + 1) if phase == DECODE else torch.arange(length)
    seen = position % size + 1 if scope == "group" else (position + 1).clamp(max=size)
    return seen.double().mean().item()


def simple_gla_work(sizes: Sizes, phase: str) -> Work:
    """Return the FLOPs and bytes of a decay for each head and token (GLA, arXiv 2312.06635; Mamba-2, arXiv
    2405.21060).

    Per token and head, it takes D² FLOPs to decay S, 2 D² to add a token and 2 D² to read S. S is in fp32.
    """
    state = 4 * sizes.rows * sizes.dim**2
    return recurrent_work(sizes, phase, 5 * sizes.dim**2, state, state)


def gated_delta_work(sizes: Sizes, phase: str) -> Work:
    """Return the FLOPs and bytes of the gated delta rule (arXiv 2412.06464).

    They are those of `simple_gla_work`, plus 2 D² FLOPs to read the value that S holds for the key.
    """
    state = 4 * sizes.rows * sizes.dim**2
    return recurrent_work(sizes, phase, 7 * sizes.dim**2, state, state)
