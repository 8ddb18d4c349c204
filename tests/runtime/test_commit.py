"""Paths of different lengths committed to the rows of one batch, against each row alone and against fresh runs."""

import copy
import random

import pytest
import torch
from families import AUGMENTED, swapped
from token_trees import GROUPS, decoded, layers, path_to, prefilled, random_ids, random_tree

from linearize_cli.models.decoding import forward, pad_left
from linearize_cli.runtime.cache import LinearCacheLayer
from linearize_cli.runtime.tree import read_tree

LENGTHS = [1, 6, 7, 8, 19]  # around windows of 8 and 6, one beyond both


def mask_of(cache) -> torch.Tensor:
    """`[B, slots]`: the rows' tokens, which lie behind all pads."""
    layer = next(layer for layer in layers(cache) if isinstance(layer, LinearCacheLayer))
    return (torch.arange(layer.seen) >= layer.seen - layer.state.count[:, None]).long()


def own(cache, row: int) -> list[torch.Tensor]:
    """All that a cache keeps of one row: states without empty slots, keys and values without pads."""
    kept, tokens = [], int(mask_of(cache)[row].sum())
    for layer in layers(cache):
        if isinstance(layer, LinearCacheLayer):
            state = layer.state.map(lambda x: x[row])
            slots = state.recent_position >= 0
            kept += [state.recent_k[:, slots], state.recent_v[:, slots], state.recent_position[slots]]
            kept += [state.S, state.z, state.sink_k, state.sink_v, state.count]
        else:
            window = getattr(layer, "sliding_window", tokens + 1) - 1
            kept += [x[row, :, -min(tokens, window) :] for x in (layer.keys, layer.values)]
    return kept


def check_row(cache, row: int, alone, tolerance: float) -> None:
    for now, then in zip(own(cache, row), own(alone, 0), strict=True):
        assert now.shape == then.shape and not ((now - then).abs() > tolerance).any()


def alone(model, ids: torch.Tensor):
    """The cache of one row `[T]` that was decoded by itself, one token at a time."""
    cache = prefilled(model, ids[None, :1], torch.ones(1, 1, dtype=torch.long))
    if len(ids) > 1:
        decoded(model, cache, torch.ones(1, 1, dtype=torch.long), ids[None, 1:])
    return cache


def bound(family: str) -> tuple[torch.dtype, float]:
    """gemma2 takes its softmax in fp32."""
    return (torch.float32, 2e-5) if family == "gemma2" else (torch.float64, 1e-10)


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("attention", [AUGMENTED, GROUPS], ids=["sliding", "groups"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mistral"])
def test_rows_that_accept_unequally_stay_as_if_alone(family, attention, keep):
    """Several trees, a path of its own for each row; some rows accept nothing, once all of them."""
    dtype, tolerance = bound(family)
    model, rng = swapped(family, attention, keep=keep).to(dtype), random.Random(2)
    rows = [random_ids(n, seed=n) for n in LENGTHS]
    cache = prefilled(model, *pad_left(rows))
    for step in range(4):
        parents = random_tree(rng, 12)
        ids = random_ids(len(rows), 12, seed=20 + step)
        tree = read_tree(model, cache, ids, parents)
        paths = [path_to(parents, rng.randrange(-1, 12)) if step != 2 else [] for _ in rows]
        for row, path in enumerate(paths):
            if path:  # the deepest accepted node
                fresh = torch.cat([rows[row], ids[row, path]])[None]
                expected = forward(model, fresh)[0, -1]
                assert (tree.logits[row, path[-1]] - expected).abs().max() < tolerance * max(
                    1, expected.abs().max()
                )
            rows[row] = torch.cat([rows[row], ids[row, path]])
        tree.commit(*paths)
        assert mask_of(cache).sum(-1).tolist() == list(map(len, rows))
        if step == 3:
            for row, tokens in enumerate(rows):
                check_row(cache, row, alone(model, tokens), tolerance)


@pytest.mark.parametrize("attention", [AUGMENTED, GROUPS], ids=["sliding", "groups"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_rejecting_any_number_leaves_no_trace(family, attention):
    """A chain of 9 behind prompts up to the edges of windows and groups: row j accepts j of it. Every tensor is that
    of a fresh run; and so is it after plain steps that follow.
    """
    model = swapped(family, attention, keep=1, num_hidden_layers=2).double()
    for length in (1, 4, 5, 6, 7, 8, 15, 16):
        prompt, draft, more = random_ids(length), random_ids(10, seed=2), random_ids(10, 2, seed=length)
        cache = prefilled(model, prompt.expand(10, -1), torch.ones(10, length, dtype=torch.long))
        tree = read_tree(model, cache, draft.expand(10, -1), range(-1, 9))
        tree.commit(*(range(accepted) for accepted in range(10)))
        followed = copy.deepcopy(cache)
        logits = decoded(model, followed, mask_of(cache), more)
        fresh = alone(model, prompt)
        for accepted in range(10):
            check_row(cache, accepted, fresh, 1e-10)
            mask, plain = torch.ones(1, length + accepted, dtype=torch.long), copy.deepcopy(fresh)
            expected = decoded(model, plain, mask, more[accepted : accepted + 1])[0]
            assert (logits[accepted] - expected).abs().max() < 1e-10 * max(1, expected.abs().max())
            check_row(followed, accepted, plain, 1e-10)
            decoded(model, fresh, mask, draft[None, accepted : accepted + 1])


def test_a_window_in_which_all_tokens_are_pads_of_others():
    """One row waits for many steps while another fills the sliding window many times over."""
    model = swapped("mistral", keep=2).double()
    rows = [random_ids(4, seed=1), random_ids(5, seed=2)]
    cache = prefilled(model, *pad_left(rows))
    for step in range(8):
        ids = random_ids(2, 4, seed=30 + step)
        read_tree(model, cache, ids, range(-1, 3)).commit([], [0, 1, 2, 3])
        rows[1] = torch.cat([rows[1], ids[1]])
    for row, tokens in enumerate(rows):
        check_row(cache, row, alone(model, tokens), 1e-10)
    more = random_ids(2, 9, seed=50)
    logits = decoded(model, cache, mask_of(cache), more)
    for row, tokens in enumerate(rows):
        expected = forward(model, torch.cat([tokens, more[row]])[None])[0, -9:]
        assert (logits[row] - expected).abs().max() < 1e-10 * max(1, expected.abs().max())


def test_paths_are_one_for_all_rows_or_one_each():
    model = swapped("llama", keep=1).double()
    caches = [prefilled(model, *pad_left([random_ids(3), random_ids(9)])) for _ in range(2)]
    for cache, paths in zip(caches, ([[0, 1]], [[0, 1], [0, 1]]), strict=True):
        tree = read_tree(model, cache, random_ids(2, 3, seed=4), [-1, 0, 1])
        tree.commit(*paths)
    for row in range(2):
        assert all(map(torch.equal, own(caches[0], row), own(caches[1], row)))
    tree = read_tree(model, caches[0], random_ids(2, 3), [-1, 0, 1])
    before = copy.deepcopy(caches[0])
    for paths in ([[0], [0], [0]], [[0], [1]], [[0, 2], []]):
        with pytest.raises(ValueError, match="paths for 2 rows|no path of the tree"):
            tree.commit(*paths)
    assert all(map(torch.equal, own(caches[0], 1), own(before, 1)))
    tree.commit([], [0])
    with pytest.raises(RuntimeError, match="moved on"):
        tree.commit([], [0])
