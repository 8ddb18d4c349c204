"""Functions that compute the equation of linear attention, such as `step`, `block` and `chunked`, and their
state.
"""

from linearize_kernels.equation import Equation, LinearAttention
from linearize_kernels.ops.bidirectional import bidirectional
from linearize_kernels.ops.chunked import chunked, commit
from linearize_kernels.ops.cross_attention import cross, encode
from linearize_kernels.ops.varlen import varlen
from linearize_kernels.reference.block import block
from linearize_kernels.reference.step import step, step_state
from linearize_kernels.state import State

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
