"""Layouts: which tokens a query sees, and whether they are near, far or read by the conv.

A layout depends on positions alone, so all layers of one geometry share it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from linearize_kernels.equation import Equation
from linearize_kernels.parts.far import FAR_PARTS
from linearize_kernels.remembered import remembered
from linearize_kernels.state import State

# `ancestors` of a query whose own token is in the state already.
LAST = torch.empty(1, 0, dtype=torch.bool), torch.tensor([-1])


@dataclass(frozen=True)
class Layout:
    """T queries and N tokens: the state's sinks, its recent tokens, and T new ones, which are the queries' own. There
    are no new ones if the queries' tokens are in the state already.

    Attributes:
        local: `[..., T, N]` bool, the tokens in L(i).
        old: the columns of `local` that may hold far tokens, M of them. The next four attributes are about these.
        new: how many of the M tokens are new: T, or 0 if no new token is far.
        old_position: `[..., M]`; -1 or the position of a sink marks a token that does not count.
        seen: `[..., T, M]` bool, the ancestors of each query.
        far: `[..., T, M]` bool, the tokens in F(i).
        any_far: `[..., T]` bool, whether anything is far, in S or outside it.
        delay: `[..., T, N]`, `p_i - p_j`.
        tap: `[..., T, N]`, the conv's tap for each token, or W if it has none.
    """

    local: Tensor
    old: slice
    new: int
    old_position: Tensor
    seen: Tensor
    far: Tensor
    any_far: Tensor
    delay: Tensor
    tap: Tensor


def lay_out(
    eq: Equation,
    recent_position: Tensor,
    position: Tensor,
    visible: Tensor,
    sink_position: Tensor,
    folded: Tensor,
    old: int | None = None,
    far_apart: bool = True,
) -> Layout:
    """Compute the layout of any positions.

    Args:
        recent_position: `[..., R]`; -1 marks a token that does not count.
        position: `[..., T]`, as of `block`.
        visible: `[..., T, T]` bool, as of `block`, or `[T, 0]` if no token is new.
        sink_position: `[..., sinks]`; -1 marks a sink that does not exist or is among the new tokens.
        folded: `[...]` bool, whether S holds a token.
        old: how many of the recent tokens, the oldest first, may be far. None means all.
        far_apart: whether a new token may be far from another one. Then all recent tokens may be far.
    """
    recent, length = recent_position.shape[-1], visible.shape[-1]
    key_position = torch.cat([sink_position, recent_position, position[..., :length]], -1)
    new = length if far_apart else 0
    far_slots = recent if old is None or far_apart else old
    columns = slice(eq.sinks, eq.sinks + far_slots + new)
    exists = (key_position >= 0)[..., None, :]
    seen = exists & pad(visible, (key_position.shape[-1] - length, 0), value=True)
    local = seen & (eq.near(position, key_position) | (key_position < eq.sinks)[..., None, :])
    far_seen = seen[..., columns] & (key_position[..., columns] >= eq.sinks)[..., None, :]
    far = far_seen & ~local[..., columns]
    delay = position[..., :, None] - key_position[..., None, :]
    tap = delay + (0 if eq.causal else eq.conv_width // 2)
    tap = torch.where(seen & (tap >= 0) & (tap < eq.conv_width), tap, eq.conv_width)
    any_far = far.any(-1) | folded[..., None]
    return Layout(local, columns, new, key_position[..., columns], far_seen, far, any_far, delay, tap)


def behind(eq: Equation, state: State, position: Tensor, visible: Tensor) -> Layout:
    """Compute the layout of new tokens after a state with any rows. A sink that is still recent counts as a sink."""
    sinks = torch.arange(eq.sinks, device=state.count.device)
    recent = state.recent_position.masked_fill(state.recent_position < eq.sinks, -1)
    folded = state.count - eq.sinks > (recent >= 0).sum(-1)
    sink_position = torch.where(sinks < state.count[..., None], sinks, -1)
    far_apart = eq.scope == "group" or position.shape[-1] > eq.size
    return lay_out(eq, recent, position, visible, sink_position, folded, far_apart=far_apart)


def shared_layout(eq: Equation, counts: Sequence[int], parents: tuple[int, ...]) -> Layout:
    """Return the layout of a tree behind rows of known lengths, on a CPU.

    All layers of one geometry share it. Its leading dimension is 1 where all rows see the same.

    Args:
        counts: tokens in each row so far.
        parents: each node's parent; -1 for none. A chain is `(-1, 0, 1, ..)`. An empty tuple lays out one query: that
            of the last token, which the state holds already.
    """
    return laid_out(eq, settled(eq, counts), parents)


def settled(eq: Equation, counts: Sequence[int]) -> tuple[int, ...]:
    """Replace counts of tokens by the smallest that have the same layout; one count if all rows share it."""
    if eq.feature_map not in FAR_PARTS:  # beyond this length only those still depend on positions
        begun, cycle = eq.recent + eq.sinks + 1, eq.size if eq.scope == "group" else 1
        counts = [n if n <= begun else begun + (n - begun) % cycle for n in counts]
    return tuple(counts) if min(counts) < max(counts) else (counts[0],)


@remembered(512)
def laid_out(eq: Equation, counts: tuple[int, ...], parents: tuple[int, ...]) -> Layout:
    """Compute the layout of `shared_layout` for `settled` counts."""
    visible, depth = ancestors(parents) if parents else LAST
    count = torch.tensor(counts)[:, None]
    place = count + depth  # of the queries
    recent = (count - eq.recent + torch.arange(eq.recent)).clamp_min(-1)
    recent = recent.masked_fill(recent < eq.sinks, -1)
    sinks = torch.arange(eq.sinks)
    farthest, old = int(depth.max()), 0
    far_apart = eq.scope == "sliding" and farthest >= eq.size
    for tokens in counts:
        end = tokens + farthest  # the deepest node's position
        if eq.scope == "group":
            far_apart = far_apart or tokens // eq.size != end // eq.size
            first_near = end - end % eq.size
        else:
            first_near = end - eq.size + 1
        old = max(old, min(first_near - (tokens - eq.recent), eq.recent))
    return lay_out(
        eq,
        recent,
        place,
        visible,
        torch.where(sinks < count, sinks, -1),
        count[:, 0] - eq.sinks > (recent >= 0).sum(-1),
        old,
        far_apart and bool(parents),
    )


@remembered(512)
def ancestors(parents: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return the ancestor matrix and the depths of tree nodes.

    Returns:
        `visible [N, N]` bool, where `visible[i, j]` says that j is i or an ancestor of i.
        depths `[N]`, 0 for roots.
    """
    visible = torch.eye(len(parents), dtype=torch.bool)
    for i, parent in enumerate(parents):
        if parent >= 0:
            visible[i] |= visible[parent]
    return visible, visible.sum(-1) - 1


@lru_cache(512)
def chain(length: int) -> tuple[int, ...]:
    """Return the parents of the nodes of a chain."""
    return tuple(range(-1, length - 1))
