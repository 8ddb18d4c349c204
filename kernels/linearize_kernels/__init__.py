"""The equation of linear attention in its forms: `step`, `block`, `chunked`, and the state between them."""

from linearize_kernels.attention import Equation, LinearAttention
from linearize_kernels.bidirectional import bidirectional
from linearize_kernels.block import block
from linearize_kernels.chunked import chunked, commit
from linearize_kernels.cross import cross, encode
from linearize_kernels.state import State
from linearize_kernels.step import step, step_state
from linearize_kernels.varlen import varlen

__all__ = [
    "Equation",
    "LinearAttention",
    "State",
    "bidirectional",
    "block",
    "chunked",
    "commit",
    "cross",
    "encode",
    "step",
    "step_state",
    "varlen",
]
