"""Layouts: masks of which tokens a query sees, and which of them are local, far or read by the conv.

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
    """The masks of T queries over N tokens: which they see, and which of these are local or far.

    Local tokens are sinks and those in the window or group, all others are far. The N tokens (columns) are
    the state's sinks, then its recent tokens, then the queries' own T tokens. The last are missing if the
    queries' tokens are in the state already.

    Attributes:
        local: `[..., T, N]` bool, True for the local tokens.
        old: the slice of the M columns that may hold far tokens. The next four attributes are about these M
            tokens.
        new: the number of the queries' own tokens among the M: T, or 0 if none of them can be far.
        old_position: `[..., M]`. A token whose position is -1 or that of a sink is ignored.
        seen: `[..., T, M]` bool, True for the ancestors of each query and its own token.
        far: `[..., T, M]` bool, True for the far tokens.
        any_far: `[..., T]` bool, True if the query has a far token, among the M or in S.
        delay: `[..., T, N]`, the distance `p_i - p_j`.
        tap: `[..., T, N]`, the index of the conv's weight for each token, or W if the conv does not read it.
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
    """Compute the masks (`Layout`) of T queries from the positions of all tokens.

    Args:
        recent_position: `[..., R]`, positions of the recent tokens. -1 marks one to ignore.
        position: `[..., T]`, positions of the queries' tokens, -1 for pads.
        visible: `[..., T, T]` bool, True where token j is token i or its ancestor. `[T, 0]` if the queries'
            tokens are in the state already.
        sink_position: `[..., sinks]`. -1 marks a sink that does not exist yet or is among the queries'
            tokens.
        folded: `[...]` bool, True if S holds a token.
        old: how many of the recent tokens, counted from the oldest, may be far (outside the window). None
            means all.
        far_apart: True if one of the queries' tokens may be far from another one. Then `old` is not used: all
            recent tokens may be far.
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
    """Compute the masks (`Layout`) of T new tokens: which tokens each of them sees as local, and which as
    far.

    Each new token sees the state's sinks and recent tokens, and those new tokens that `visible` names. A
    recent token that is also a sink is treated as a sink only. Rows may have different numbers of earlier
    tokens.

    Args:
        eq: the layer's equation.
        state: the state before the new tokens.
        position: `[..., T]`, positions of the new tokens, -1 for pads.
        visible: `[..., T, T]` bool, True where token j is token i or its ancestor.
    """
    sinks = torch.arange(eq.sinks, device=state.count.device)
    recent = state.recent_position.masked_fill(state.recent_position < eq.sinks, -1)
    folded = state.count - eq.sinks > (recent >= 0).sum(-1)
    sink_position = torch.where(sinks < state.count[..., None], sinks, -1)
    far_apart = eq.scope == "group" or position.shape[-1] > eq.size
    return lay_out(eq, recent, position, visible, sink_position, folded, far_apart=far_apart)


def shared_layout(eq: Equation, counts: Sequence[int], parents: tuple[int, ...]) -> Layout:
    """Return the masks (`Layout`) of the nodes of a token tree that follows rows of known lengths, on a CPU.

    The result is cached, and shared by all layers with the same equation. Its leading dimension is 1 if all
    rows see the same.

    Args:
        counts: the number of tokens in each row so far.
        parents: the index of each node's parent, -1 for a root. A text is the tree `(-1, 0, 1, ..)`. With an
            empty tuple there is one query, that of the last token, which the state holds already.
    """
    return laid_out(eq, settled(eq, counts), parents)


def settled(eq: Equation, counts: Sequence[int]) -> tuple[int, ...]:
    """Replace the lengths of rows by the smallest lengths that have the same masks, so that the masks can be
    cached.

    Args:
        counts: the number of tokens in each row.

    Returns:
        One length for each row, or a single one if all rows have the same.
    """
    if eq.feature_map not in FAR_PARTS:  # beyond this length only those still depend on positions
        begun, cycle = eq.recent + eq.sinks + 1, eq.size if eq.scope == "group" else 1
        counts = [n if n <= begun else begun + (n - begun) % cycle for n in counts]
    return tuple(counts) if min(counts) < max(counts) else (counts[0],)


@remembered(512)
def laid_out(eq: Equation, counts: tuple[int, ...], parents: tuple[int, ...]) -> Layout:
    """Compute the masks (`Layout`) of the nodes of a token tree, for `shared_layout`. The result is cached.

    Args:
        counts: the rows' lengths, shortened by `settled`.
        parents: the index of each node's parent, -1 for a root. An empty tuple for the query of the last
            token.
    """
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
    """Return the ancestor matrix and the depths of the N nodes of a tree.

    Args:
        parents: the index of each node's parent, -1 for a root.

    Returns:
        `visible` `[N, N]` bool, where `visible[i, j]` is True if j is i or an ancestor of i, and the depths
        `[N]`, 0 for roots.
    """
    visible = torch.eye(len(parents), dtype=torch.bool)
    for i, parent in enumerate(parents):
        if parent >= 0:
            visible[i] |= visible[parent]
    return visible, visible.sum(-1) - 1


@lru_cache(512)
def chain(length: int) -> tuple[int, ...]:
    """Return the parents of the nodes of a chain, `(-1, 0, 1, ..)`, which has `length` nodes."""
    return tuple(range(-1, length - 1))
