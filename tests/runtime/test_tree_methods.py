"""Every method's token trees: nodes against decoding one token at a time, from every place in a group or window, in
batches of rows of different lengths behind pads.
"""

import copy
import random
from dataclasses import replace

import pytest
import torch
from families import swapped
from linearize_kernels import LinearAttention, State, block, chunked, commit
from token_trees import check_tree, decoded, path_to, prefilled, random_ids, random_tree

from linearize_cli.methods.registry import load_recipe, method_names
from linearize_cli.models.decoding import forward, pad_left
from linearize_cli.runtime.dispatch import converted
from linearize_cli.runtime.layer import equation
from linearize_cli.runtime.tree import ancestors, read_tree

GROUP, TREES = 5, 16
GEOMETRY = dict(heads=4, kv_heads=2, key_dim=6, value_dim=5, scale=0.4)


def small(method: str) -> dict:
    """The method's attention at a size where a few tokens cross every boundary."""
    recipe = load_recipe(method)
    overrides = [f"attention.local.size={GROUP}"] if recipe.attention.local else []
    if recipe.attention.far and recipe.attention.far.feature_map in ("yoso", "performer"):
        overrides.append("attention.far.feature_dim=16")  # their defaults are many
    return load_recipe(method, overrides).to_dict()["attention"]


def layer(method: str, seed: int, dtype: torch.dtype) -> LinearAttention:
    torch.manual_seed(seed)
    attention = LinearAttention(equation(small(method), GEOMETRY)).to(dtype)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return attention


def normal(batch: int, length: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v; with a mean, for sums over random keys alone hide a forgotten one."""
    shapes = ((4, 6), (2, 6), (2, 5))
    return [torch.randn(batch, h, length, d, dtype=dtype) + 0.2 for h, d in shapes]


def check_random_tree(method: str, seed: int, dtype: torch.dtype, tolerance: float) -> None:
    """A random tree behind a row for each offset in a group; then a random path a row, committed, and a token more."""
    rng, attention = random.Random(seed), layer(method, seed, dtype)
    first = rng.choice([1, 1, GROUP - 1, 2 * GROUP, 37])
    lengths = torch.tensor([first + offset for offset in range(GROUP)])[torch.randperm(GROUP)]
    longest, parents = int(lengths.max()), random_tree(rng, rng.randint(1, 3 * GROUP))
    nodes = len(parents)
    prefix = normal(GROUP, longest, dtype)
    valid = torch.arange(longest) >= longest - lengths[:, None]
    _, state = chunked(attention, None, *prefix, valid)
    tokens, (visible, depth) = normal(GROUP, nodes, dtype), ancestors(tuple(parents))
    before = state.fork()
    out = block(attention, state, *tokens, lengths[:, None] + depth, visible)
    assert all(torch.equal(getattr(state, name), value) for name, value in vars(before).items())
    bound, after = tolerance * max(1.0, out.abs().max().item()), [state]
    for node, parent in enumerate(parents):  # after[i + 1]: the state behind node i
        token = (x[:, :, node : node + 1] for x in tokens)
        expected, following = chunked(attention, after[parent + 1], *token)
        after.append(following)
        assert (out[:, :, node] - expected[:, :, 0]).abs().max() < bound, (node, parents)
    # A row may accept nothing, some or all of a path: the shorter ones have pads before them.
    paths = [path_to(parents, rng.randrange(-1, nodes)) for _ in range(GROUP)]
    deepest = max(1, *map(len, paths))
    index = torch.tensor([[-1] * (deepest - len(path)) + path for path in paths])
    order = index.clamp_min(0)[:, None, :, None]
    k, v = (x.gather(2, order.expand(-1, x.shape[1], -1, x.shape[-1])) for x in tokens[1:])
    committed, more = commit(attention, state, k, v, index >= 0), normal(GROUP, 1, dtype)
    found, _ = chunked(attention, committed, *more)
    for row, path in enumerate(paths):
        alone = after[path[-1] + 1 if path else 0].map(lambda x, row=row: x[row : row + 1])
        expected, _ = chunked(attention, alone, *(x[row : row + 1] for x in more))
        assert (found[row] - expected[0]).abs().max() < bound
        own = committed.map(lambda x, row=row: x[row : row + 1])
        for now, then in zip(filled(own), filled(alone), strict=True):
            assert not ((now - then).abs() > bound).any()


def filled(state: State) -> list[torch.Tensor]:
    """All tensors of a state; what lies in empty slots, which pads may have been in, does not count."""
    slots = (state.recent_position >= 0)[:, None, :, None]
    cleared = replace(state, recent_k=state.recent_k * slots, recent_v=state.recent_v * slots)
    return list(vars(cleared).values())


@pytest.mark.parametrize("method", method_names())
def test_a_tree_is_its_paths_decoded(method):
    """In double, within 1e-10: for each of the methods 16 trees at every offset."""
    for seed in range(TREES):
        check_random_tree(method, seed, torch.float64, 1e-10)


def test_there_are_cases_enough():
    assert TREES * len(method_names()) >= 500


@pytest.mark.parametrize("method", method_names())
def test_a_tree_is_its_paths_decoded_in_single_precision(method):
    check_random_tree(method, 0, torch.float32, 1e-4)


@pytest.mark.parametrize("method", ["augmented:flash", "gated-delta", "linformer", "lolcats-group", "yoso"])
def test_whole_models_of_other_methods(method):
    model = swapped("llama", small(method), keep=1).double()
    check_tree(model, [3, 9, 14], random_tree(random.Random(0), 9), 1e-10)


@torch.no_grad()
@pytest.mark.parametrize("keep", [0, 1])
def test_half_precision_adds_nothing_to_its_own_noise(keep):
    """The noise: what several tokens in one forward differ from the same one by one. A tree's must be within twice
    that.
    """
    model = swapped("llama", keep=keep).bfloat16()
    for module in converted(model).values():
        module.linear_attention.float()
    rng, noise, tree = random.Random(0), [], []
    for seed in range(4):
        rows, mask = pad_left([random_ids(n, seed=10 * seed + n) for n in (3, 9, 14, 22)])
        cache, parents = prefilled(model, rows, mask), random_tree(rng, 12)
        ids = random_ids(4, 12, seed=seed)
        grown = torch.cat([mask, mask.new_ones(4, 12)], 1)
        one_by_one = decoded(model, copy.deepcopy(cache), mask, ids)
        noise.append(forward(model, ids, copy.deepcopy(cache), grown) - one_by_one)
        logits = read_tree(model, cache, ids, parents).logits
        for node in range(12):
            path = path_to(parents, node)
            tree.append(logits[:, node] - decoded(model, copy.deepcopy(cache), mask, ids[:, path])[:, -1])
    noise, tree = (torch.cat([x.flatten() for x in parts]).double() for parts in (noise, tree))
    floor = torch.finfo(torch.bfloat16).eps * logits.abs().max().double()  # one rounding
    assert tree.square().mean().sqrt() < 2 * noise.square().mean().sqrt().clamp_min(floor)
    assert tree.abs().max() < 2 * noise.abs().max().clamp_min(floor)
