"""Bytes and launches of a layer's prefill on a GPU, counted without one.

    python benchmarks/traffic.py --context 32768

The layer runs on meta tensors, which have no memory. Every torch operation is counted with the bytes of its inputs and
outputs, and every Triton kernel with the bytes of its tensors, each once: what chunks read again is in the caches. The
time is the longer one of these bytes at an H200's measured 4.3 TB/s and the kernels' FLOPs at its 790 TFLOP/s.
"""

from contextlib import ExitStack, nullcontext
from typing import NamedTuple
from unittest.mock import patch

import click
import torch
from linearize_kernels import LinearAttention, chunked
from linearize_kernels.triton import fused, fused_grouped, fused_sliding
from linearize_kernels.triton.fused_inputs import TILE
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from linearize_cli.methods.registry import load_recipe
from linearize_cli.runtime.layer import equation

METHODS = ("augmented", "augmented:flash")
DIM = 128  # of a head
BANDWIDTH, PEAK = 4.3e12, 790e12  # bytes/s of a copy and bf16 FLOP/s, measured on an H200
KERNELS = {
    fused: ("write_features", "segment_sums", "carry"),
    fused_sliding: ("attend_segment",),
    fused_grouped: ("attend_groups",),
}
VIEWS = {
    "view",
    "_unsafe_view",
    "transpose",
    "slice",
    "select",
    "expand",
    "t",
    "detach",
    "alias",
    "as_strided",
    "split",
}
ALLOCATIONS = {"empty", "new_empty", "empty_like", "new_empty_strided", "empty_strided"}


class Count(NamedTuple):
    """Memory traffic of one layer's prefill, in bytes a token and head.

    Attributes:
        launches: torch operations that start work on the device.
        torch_bytes: their inputs and outputs.
        kernels: the bytes of each Triton kernel, in the order of their launches.
    """

    launches: int
    torch_bytes: float
    kernels: list[tuple[str, float]]


class Operations(TorchDispatchMode):
    """Counts torch operations that are no views, and the bytes of their inputs and outputs."""

    def __init__(self):
        super().__init__()
        self.launches, self.bytes = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.__name__.split(".")[0]
        if name not in VIEWS | ALLOCATIONS:
            self.launches += 1
            self.bytes += sum(size(x) for x in tree_leaves((args, out)) if isinstance(x, torch.Tensor))
        return out


class Recorded:
    """A stand-in for a kernel that records the bytes of its tensors."""

    def __init__(self, name: str, found: list):
        self.name, self.found = name, found

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
            twice = 2 if self.name == "carry" else 1  # it replaces the sums in place
            self.found.append((self.name, twice * sum(map(size, tensors))))

        return launch


def size(x: torch.Tensor) -> int:
    """Return the bytes of a tensor, counting expanded dimensions once."""
    return (
        x.element_size() * torch.Size(n for n, step in zip(x.shape, x.stride(), strict=True) if step).numel()
    )


def count(method: str, length: int, heads: int = 32, kv_heads: int = 32) -> Count:
    """Count a prefill of `length` tokens from the start, in bfloat16, with the tiles of an H200."""
    geometry = dict(heads=heads, kv_heads=kv_heads, key_dim=DIM, value_dim=DIM, scale=DIM**-0.5)
    attention = LinearAttention(equation(load_recipe(method).to_dict()["attention"], geometry)).to("meta")
    attention.impl, found = "triton", []
    q, k, v = (
        torch.empty(1, length, n, DIM, dtype=torch.bfloat16, device="meta").transpose(1, 2)
        for n in (heads, kv_heads, kv_heads)
    )
    with ExitStack() as stack:
        for module, names in KERNELS.items():
            for name in names:
                stack.enter_context(patch.object(module, name, Recorded(name, found)))
        # No CUDA device is asked for.
        stack.enter_context(patch("linearize_kernels.triton.common.INTERPRETED", True))
        stack.enter_context(patch("linearize_kernels.triton.fused.capability", lambda device: 9))
        stack.enter_context(
            patch("linearize_kernels.ops.backend.torch.autocast", lambda *_, **__: nullcontext())
        )
        stack.enter_context(torch.no_grad())
        operations = stack.enter_context(Operations())
        chunked(attention, None, q, k, v, segment=length)
    each = length * heads
    return Count(
        operations.launches, operations.bytes / each, [(name, bytes / each) for name, bytes in found]
    )


def flops(method: str) -> float:
    """Return the kernels' FLOPs a token and query head, with one KV head for each, and the tiles of an H200."""
    parts, tile, square = load_recipe(method).to_dict()["attention"], TILE, 2 * DIM * DIM
    window, taps = parts["local"]["size"], parts["conv"]["width"] if parts.get("conv") else 0
    programs = -(-DIM // fused.VALUES)  # that repeat the scores
    sums = 3 * square  # S of a segment, S within the segment, and φ(q) S
    if parts["local"]["scope"] == "group":
        columns = (window + tile) / 2
        return sums + 2 * DIM * columns * (programs + 1) + 2 * DIM * taps / 2
    columns = tile + window
    projections = 4 * square / 2  # W of q and k: fp32, so two products of bfloat16
    return sums + projections + 2 * DIM * (columns * (programs + 1) + tile * programs + tile + taps)


@click.command(help=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--context", type=click.IntRange(1024), default=1 << 15, show_default=True, help="Tokens.")
@click.option("--heads", type=click.IntRange(1), default=32, show_default=True, help="Number of query heads.")
@click.option("--kv-heads", type=click.IntRange(1), default=32, show_default=True, help="Number of KV heads.")
def main(context: int, heads: int, kv_heads: int) -> None:
    """Count two methods that have Triton kernels, and print what they move."""
    softmax = 2 * DIM * context * context * heads / PEAK
    for method in METHODS:
        found = count(method, context, heads, kv_heads)
        print(
            f"{method}: torch moves {found.torch_bytes:,.0f} bytes a token and head in {found.launches} launches"
        )
        for name, moved in found.kernels:
            print(f"  {name:16} {moved:8,.0f} bytes")
        moved, work = sum(moved for _, moved in found.kernels), flops(method)
        print(f"  together         {moved:8,.0f} bytes, {work / 1e3:,.0f} kFLOP")
        took = context * heads * max((moved + found.torch_bytes) / BANDWIDTH, work / PEAK)
        print(f"  at least {took * 1e3:.2f} ms on an H200; softmax takes at least {softmax * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
