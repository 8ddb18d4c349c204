"""Token trees and the check that every node computes what decoding its path computes."""

import copy
import random

import torch
from families import SMALL
from transformers import DynamicCache

from linearize_cli.models.decoding import forward, pad_left
from linearize_cli.runtime.cache import LinearCacheLayer
from linearize_cli.runtime.compatibility import DummyLayer
from linearize_cli.runtime.tree import read_tree

GROUPS = {
    "local": {"scope": "group", "size": 8, "score": "relu2"},
    "far": {"feature_map": "identity"},
    "combine": "none",
    "conv": {"width": 4},
}


def random_tree(rng: random.Random, nodes: int) -> list[int]:
    """Deep and wide: half of the nodes go on from the one before."""
    return [-1, *(i - 1 if rng.random() < 0.5 else rng.randrange(i) for i in range(1, nodes))]


def random_ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, SMALL["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def path_to(parents: list[int], node: int) -> list[int]:
    path = []
    while node >= 0:
        path, node = [node, *path], parents[node]
    return path


@torch.no_grad()
def prefilled(model, rows, mask) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    forward(model, rows, cache, mask)
    return cache


@torch.no_grad()
def decoded(model, cache, mask, ids) -> torch.Tensor:
    """Logits of tokens that follow one by one."""
    outputs = []
    for token in ids.split(1, 1):
        mask = torch.cat([mask, torch.ones_like(token)], 1)
        outputs.append(forward(model, token, cache, mask))
    return torch.cat(outputs, 1)


def layers(cache) -> list:
    """A cache's layers without those that read another's keys."""
    return [layer for layer in cache.layers if not isinstance(layer, DummyLayer)]


def tensors(cache) -> list[torch.Tensor]:
    """All that a cache keeps."""
    kept = []
    for layer in layers(cache):
        is_linear = isinstance(layer, LinearCacheLayer)
        kept += vars(layer.state).values() if is_linear else [layer.keys, layer.values]
    return kept


def check_tree(model, lengths, parents, tolerance) -> None:
    """Nodes as decoded; the cache untouched; a path committed as decoded, and what follows it too."""
    rows, mask = pad_left([random_ids(n, seed=n) for n in lengths])
    ids, more = random_ids(len(lengths), len(parents), seed=2), random_ids(len(lengths), 3, seed=3)
    cache = prefilled(model, rows, mask)
    before = [tensor.clone() for tensor in tensors(cache)]
    lengths_before = [layer.get_seq_length() for layer in layers(cache)]
    tree = read_tree(model, cache, ids, parents)
    assert all(torch.equal(now, then) for now, then in zip(tensors(cache), before, strict=True))
    assert [layer.get_seq_length() for layer in layers(cache)] == lengths_before
    deepest = max((path_to(parents, node) for node in range(len(parents))), key=len)
    bound = tolerance * max(1.0, tree.logits.abs().max().item())
    for node in range(len(parents)):
        path = path_to(parents, node)
        logits = decoded(model, copy.deepcopy(cache), mask, ids[:, path])
        assert (tree.logits[:, node] - logits[:, -1]).abs().max() < bound, (node, path)
    for path in (deepest, deepest[:1], []):
        accepted = copy.deepcopy(cache)
        read_tree(model, accepted, ids, parents).commit(path)
        fresh = copy.deepcopy(cache)
        expected = decoded(model, fresh, mask, torch.cat([ids[:, path], more], 1))[:, len(path) :]
        grown = torch.cat([mask, mask.new_ones(len(mask), len(path))], 1)
        assert (decoded(model, accepted, grown, more) - expected).abs().max() < bound
        for now, then in zip(tensors(accepted), tensors(fresh), strict=True):
            assert now.shape == then.shape and not ((now - then).abs() > bound).any()
