"""Token trees after a cached prefix: the logits of all nodes in one forward, and the commit of an accepted
path.

Reading a tree does not change the cache. While a tree is read, the model gets a copy of the cache in which
each layer is replaced by a branch: a layer that reads the prefix and keeps the nodes apart from it.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
from linearize_kernels.equation import LinearAttention
from linearize_kernels.ops.chunked import commit, nodes, take
from linearize_kernels.reference.visibility import ancestors
from linearize_kernels.triton.nodes import commit_
from linearize_kernels.triton.nodes import tree as attend_tree
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from linearize_cli.runtime.cache import LinearCacheLayer
from linearize_cli.runtime.compatibility import DummyLayer
from linearize_cli.runtime.offload import loaded


@dataclass(frozen=True)
class Shape:
    """The shape of a tree of N nodes.

    Attributes:
        parents: the index of each node's parent, -1 for a root.
        depth: `[N]` int64, 0 for a root.
        visible: `[N, N]` bool, `visible[i, j]` is True if j is i or an ancestor of i.
        position: `[B, N]` int64, every node's position in its row.
    """

    parents: tuple[int, ...]
    depth: Tensor
    visible: Tensor
    position: Tensor


class LinearBranch(LinearCacheLayer):
    """A temporary cache layer of a converted attention layer, used while a token tree is read.

    It reads the state of the real cache layer (`prefix`) and keeps the tree's keys and values apart from it.
    """

    def __init__(self, prefix: LinearCacheLayer, shape: Shape):
        super().__init__()
        self.prefix, self.shape, self.state, self.seen = prefix, shape, prefix.state, prefix.seen

    def attend(
        self,
        attention: LinearAttention,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        valid: Tensor | None,
        sink_logits: Tensor | None,
    ) -> Tensor:
        self.attention, self.new = attention, (k, v)
        written = self.prefix.state_to_write(attention, q, sink_logits)
        if written is not None:
            self.state = written
            position, visible = self.shape.position.to(q.device), self.shape.visible.to(q.device)
            return attend_tree(attention, written, q, k, v, position, visible).to(q.dtype)
        state = self.state
        assert state is not None  # `read_tree` refuses an empty cache
        return nodes(attention, state, q, k, v, self.shape.parents, sink_logits).to(q.dtype)

    def commit(self, path: Tensor, valid: Tensor | None) -> None:
        assert self.attention is not None  # the tree was read
        k, v = (take(x, path) for x in self.new)
        with loaded(self.attention):
            self.append_path(k, v, valid)

    def append_path(self, k: Tensor, v: Tensor, valid: Tensor | None) -> None:
        """Append the tokens of an accepted path (a chain of tree nodes from a root on) to the state of the
        real cache layer.

        Args:
            k, v: the path's keys and values, `[B, kv, T, D]` and `[B, kv, T, Dv]`.
            valid: `[B, T]` bool, False for the pads of shorter paths, or None if all paths are equally long.
        """
        assert self.attention is not None  # the tree was read
        written, before = self.prefix.state_to_write(self.attention, k, None), self.prefix.state
        if written is not None:
            commit_(self.attention, written, k, v, valid)
            self.prefix.seen += k.shape[-2]
            return
        assert before is not None  # `read_tree` refuses an empty cache
        state = commit(self.attention, before, k, v, valid)
        self.prefix.append(self.attention, state, k, v, valid)


class SoftmaxBranch(DynamicLayer):
    """A temporary cache layer of a kept softmax layer, used while a token tree is read.

    It reads the keys and values of the real cache layer (`prefix`) and keeps the tree's own apart from them.
    """

    def __init__(self, prefix: DynamicLayer, shape: Shape):
        super().__init__()
        self.prefix, self.is_sliding = prefix, prefix.is_sliding

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        self.new = key_states, value_states
        return copy.copy(self.prefix).update(key_states, value_states)

    def get_seq_length(self) -> int:
        return self.prefix.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.prefix.get_mask_sizes(query_length)

    def commit(self, path: Tensor, valid: Tensor | None) -> None:
        new = [take(x, path) for x in self.new]
        if valid is not None:  # a shorter path's pads go left of all that its row has
            keys, values = self.prefix.keys, self.prefix.values
            assert keys is not None and values is not None  # `read_tree` refuses an empty cache
            stored = keys.shape[-2]
            order = pad(valid.to(new[0].device), (stored, 0), value=True).long().argsort(dim=-1, stable=True)
            rows = [take(torch.cat(pair, -2), order) for pair in zip((keys, values), new, strict=True)]
            self.prefix.keys, self.prefix.values = (x[..., :stored, :] for x in rows)
            new = [x[..., stored:, :] for x in rows]
        self.prefix.update(*new)


class DummyBranch(DummyLayer):
    """A temporary cache layer, used while a token tree is read, of an attention layer that has no cache of
    its own.

    Such a layer reads another layer's keys and values, so there is nothing to keep.
    """

    def __init__(self, prefix: DummyLayer, shape: Shape):
        super().__init__()

    def commit(self, path: Tensor, valid: Tensor | None) -> None: ...


BRANCHES: dict[type, Callable[..., Any]] = {
    LinearCacheLayer: LinearBranch,
    DynamicLayer: SoftmaxBranch,
    DynamicSlidingWindowLayer: SoftmaxBranch,
    DummyLayer: DummyBranch,
}


@dataclass
class Tree:
    """The logits of a token tree's nodes, and what is needed to append an accepted path to the cache.

    Attributes:
        logits: `[B, N, vocab]`. A node's logits are those after its path from the root, decoded token by
            token.
        hidden: `[B, N, width]`, the last hidden states, which the LM head reads.
        shape: the tree's parents, depths, ancestors and positions.
        parents: the index of each node's parent, -1 for a root.
        branches: a temporary cache layer for each layer of the cache, which holds the nodes' keys and values.
    """

    logits: Tensor
    hidden: Tensor
    shape: Shape
    parents: Sequence[int]
    branches: list[LinearBranch | SoftmaxBranch | DummyBranch]

    def path(self, node: int) -> list[int]:
        """Return the indices of the nodes from a root to the given node, both included."""
        path: list[int] = []
        while node >= 0:
            path, node = [node, *path], self.parents[node]
        return path

    @torch.no_grad()
    def commit(self, *paths: Sequence[int]) -> None:
        """Append the nodes of accepted paths to the cache.

        Args:
            paths: one path for all rows, or one for each row. A path is a list of nodes from a root on, from
                parent to child. An empty path appends nothing. Rows with shorter paths get pads on the left.

        Raises:
            ValueError: a list of nodes is not such a path, or the number of paths is neither 1 nor that of
                the rows.
            RuntimeError: the cache was changed since the tree was read.
        """
        rows, count = self.logits.shape[:2]
        chosen = [list(path) for path in (paths * rows if len(paths) == 1 else paths)]
        if len(chosen) != rows:
            raise ValueError(f"{len(chosen)} paths for {rows} rows")
        for path in chosen:
            if path and not (0 <= path[-1] < count and path == self.path(path[-1])):
                raise ValueError(
                    f"{path} is no path of the tree: it must go from a root from parent to child"
                )
        linear = (branch for branch in self.branches if isinstance(branch, LinearBranch))
        if any(x.state is not x.prefix.state or x.seen != x.prefix.seen for x in linear):
            raise RuntimeError("the cache has moved on since the tree was read")
        longest = max(map(len, chosen))
        if longest == 0:
            return
        nodes = torch.tensor(
            [[-1] * (longest - len(path)) + path for path in chosen], device=self.logits.device
        )
        valid = nodes >= 0 if min(map(len, chosen)) < longest else None
        for branch in self.branches:
            branch.commit(nodes.clamp_min(0), valid)


@torch.no_grad()
def read_tree(model: PreTrainedModel, cache: Cache, ids: Tensor, parents: Sequence[int]) -> Tree:
    """Compute the logits of the nodes of a token tree that continues every row of a cache. The cache is not
    changed.

    Args:
        model: a linearized model.
        cache: the cache after the rows' prefixes, which may have pads on the left.
        ids: `[B, N]`, the nodes' tokens.
        parents: the index of each node's parent, -1 for a root. Parents come before their children.

    Raises:
        ValueError: the parents are not a tree of N nodes, or the cache holds no prefix.
        NotImplementedError: the model cannot verify trees. A cache layer holds something that cannot branch
            (a recurrent state, a static buffer), the model takes no `position_ids`, or a kept softmax layer
            gets no 4-D mask or hides tokens by itself.
    """
    if len(parents) != ids.shape[1] or not all(-1 <= parent < i for i, parent in enumerate(parents)):
        raise ValueError(
            f"parents {list(parents)} are no tree of {ids.shape[1]} nodes, parents before children"
        )
    kinds = {type(layer) for layer in cache.layers} - BRANCHES.keys()
    strange = {f"{kind.__name__} of {kind.__module__}" for kind in kinds}
    if strange:
        raise NotImplementedError(f"a tree cannot branch off what the cache holds: {', '.join(strange)}")
    # Where positions are a bias on distances, converted layers need none from the model.
    by_distance = all(geometry.get("bias") for geometry in model.config.linearize["layers"].values())
    if "position_ids" not in signature(model.forward).parameters and not by_distance:
        raise NotImplementedError(
            f"{type(model).__name__} takes no position_ids: it cannot be told the places of a tree's nodes"
        )
    first = next((x for x in cache.layers if isinstance(x, LinearCacheLayer) and x.state is not None), None)
    state = None if first is None else first.state
    if first is None or state is None:
        raise ValueError("the cache holds no prefix: run the model on it first")
    count = state.count
    parents = tuple(parents)
    visible, depth = (x.to(ids.device) for x in ancestors(parents))
    shape = Shape(parents, depth, visible, count[:, None] + depth)
    branched = copy.copy(cache)
    branches: list[Any] = [BRANCHES[type(layer)](layer, shape) for layer in cache.layers]
    branched.layers = branches
    slots = torch.arange(first.seen + len(parents), device=ids.device)
    hook = partial(pass_tree_mask, shape=shape)
    with ExitStack() as hooks:
        hidden = hooks.enter_context(read_by_head(model))
        for name in model.config.linearize["softmax"]:
            module = model.get_submodule(name)
            hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        logits = model(
            input_ids=ids,
            past_key_values=branched,
            use_cache=True,
            attention_mask=(slots >= first.seen - count[:, None]).long(),
            position_ids=shape.position,
        ).logits
    return Tree(logits, hidden[-1], shape, parents, branches)


@contextmanager
def read_by_head(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collect the last hidden states of every forward while the context is open.

    The context yields a list. Each forward of the model appends the LM head's input, `[B, T, width]`, to it.
    """
    seen: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        hook.remove()


def pass_tree_mask(module: nn.Module, args: tuple, kwargs: dict, shape: Shape) -> tuple[tuple, dict] | None:
    """Replace the attention mask of a kept softmax layer by one for a tree. This is a forward pre-hook.

    The model makes its mask for N tokens that follow one another, with pads and a window or chunks. In the
    new mask, a node sees the same tokens of the prefix as the token at its depth does in the model's mask. Of
    the tree, it sees its ancestors and itself. With a single node the mask is not changed.

    Raises:
        NotImplementedError: the layer has no 4-D mask, or hides or biases tokens by itself.
    """
    mask, nodes = kwargs.get("attention_mask"), len(shape.depth)
    if nodes == 1:
        return None
    if not getattr(module, "mask_is_all", True):
        raise NotImplementedError(f"{type(module).__name__} hides or biases tokens by itself, as in a chain")
    if mask is None or mask.dim() != 4:
        raise NotImplementedError(
            f"{type(module).__name__} attends without a 4-D mask, which a tree needs: load the model with "
            'attn_implementation="sdpa" or "eager"'
        )
    prefix, depth = mask.shape[-1] - nodes, shape.depth.to(mask.device)
    columns = torch.cat([torch.arange(prefix, device=mask.device), prefix + depth])
    mask = mask[:, :, depth][..., columns]
    hidden = pad(~shape.visible.to(mask.device), (prefix, 0), value=False)
    lowest = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return args, {**kwargs, "attention_mask": mask.masked_fill(hidden, lowest)}
