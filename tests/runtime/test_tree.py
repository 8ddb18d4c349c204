"""Token trees through whole models: every node against the sequential decoding of its path."""

import copy
import random

import pytest
import torch
from families import AUGMENTED, CONVERTED, SENSITIVE, SMALL, swap, swapped
from token_trees import GROUPS, check_tree, decoded, prefilled, random_ids, random_tree, tensors
from transformers import AutoModelForCausalLM, DynamicCache, RoFormerConfig, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from linearize_cli.models.decoding import forward
from linearize_cli.runtime.tree import read_tree

CHAIN, STAR, FOREST = [-1, 0, 1, 2], [-1, 0, 0, 0, 0], [-1, -1, 0, 1, 1]
TREE = [-1, 0, 0, 1, 1, 2, 3, 6, 7, 7, 9, 10, 4]  # 8 deep: beyond every window here


# What the kept softmax layers of some families say.
REFUSED = {
    **dict.fromkeys(["bloom", "gpt-neo", "mpt"], "hides or biases tokens by itself"),
    "deepseek-v3.2": "cannot branch off what the cache holds: DynamicIndexedLayer",
}
RECURRENT = ["falcon-h1", "lfm2", "olmo-hybrid", "qwen3-next"]
FAMILIES = ["llama", "gpt2", "gemma2", "mistral"]


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("attention", [AUGMENTED, GROUPS], ids=["sliding", "groups"])
@pytest.mark.parametrize("family", FAMILIES)
def test_nodes_are_their_paths_decoded(family, attention, keep):
    model, rng = swapped(family, attention, keep=keep), random.Random(0)
    # Rows around the edges of windows of 8 and 6, sinks and the conv; the last has no pads.
    check_tree(model, [1, 5, 7, 8, 21], TREE, 1e-5)
    check_tree(model, [13, 2, 16], random_tree(rng, 11), 1e-5)
    check_tree(model, [6], random_tree(rng, 14), 1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])  # gemma2 takes its softmax in fp32
def test_every_offset_in_double(family):
    model, rng = swapped(family, GROUPS, keep=1).double(), random.Random(1)
    for parents in (CHAIN, STAR, FOREST, [-1]):
        check_tree(model, [4, 9], parents, 1e-10)
    for length in range(1, 10):
        check_tree(model, [length, 3], random_tree(rng, 9), 1e-10)


def test_kept_layers_in_eager():
    model = swapped("mistral", keep=2)
    model.config._attn_implementation_internal = "eager"
    check_tree(model, [1, 5, 21], TREE, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("family", [name for name in CONVERTED if name not in RECURRENT])
def test_nodes_of_every_family(family, keep):
    model = swapped(family, keep=keep)
    if keep and family in REFUSED:
        with pytest.raises(NotImplementedError, match=REFUSED[family]):
            read_tree(model, short_prefix(model), random_ids(2, 3), [-1, 0, 0])
    elif family in SENSITIVE:
        check_tree(model, [1, 5, 7, 8, 21], TREE, 1e-4)
        check_tree(model.double(), [1, 5, 7, 8, 21], TREE, 1e-10)
    else:
        check_tree(model, [1, 5, 7, 8, 21], TREE, 1e-5)


def short_prefix(model) -> DynamicCache:
    ids = random_ids(2, 9)
    return prefilled(model, ids, torch.ones_like(ids))


def test_trees_follow_one_another():
    """Each step commits a path and reads the next tree from there; the cache can take tokens back after it."""
    model, ids = swapped("llama", keep=1), random_ids(2, len(TREE), seed=5)
    cache, mask, committed = short_prefix(model), torch.ones(2, 9, dtype=torch.long), []
    cache.activate_past_recording()
    fresh = copy.deepcopy(cache)
    for path in ([0, 1, 3, 6], [0], [0, 2, 5]):
        tree = read_tree(model, cache, ids, TREE)
        tree.commit(path)
        committed.append(ids[:, path])
    expected = decoded(model, copy.deepcopy(fresh), mask, torch.cat(committed, 1))
    torch.testing.assert_close(tree.logits[:, path], expected[:, -3:], atol=1e-5, rtol=0.0)
    cache.crop(-2)
    decoded(model, fresh, mask, torch.cat(committed, 1)[:, :-2])
    for now, then in zip(tensors(cache), tensors(fresh), strict=True):
        torch.testing.assert_close(now, then, atol=1e-5, rtol=0.0)


def test_what_is_no_tree_is_refused():
    model = swapped("llama", keep=1)
    cache, ids = short_prefix(model), random_ids(2, 3)
    for parents in ([-1, 0], [-1, 2, 0], [-1, 1, 0], [-2, 0, 0]):
        with pytest.raises(ValueError, match="no tree of 3 nodes"):
            model.read_tree(cache, ids, parents)
    with pytest.raises(ValueError, match="no prefix"):
        model.read_tree(DynamicCache(config=model.config), ids, [-1, 0, 0])
    tree = model.read_tree(cache, ids, [-1, 0, 0])
    for path in ([1], [0, 1, 2], [2, 0], [0, 0], [0, 9], [-1]):
        with pytest.raises(ValueError, match="no path of the tree"):
            tree.commit(path)
    tree.commit([0, 2])
    with pytest.raises(RuntimeError, match="moved on"):
        tree.commit([0, 2])


@pytest.mark.parametrize("family", RECURRENT)
def test_recurrent_layers_cannot_branch(family):
    model = swapped(family)
    with pytest.raises(NotImplementedError, match="cannot branch off"):
        read_tree(model, short_prefix(model), random_ids(2, 3), [-1, 0, 0])


def test_models_that_count_positions_themselves_are_refused():
    sizes = dict(embedding_size=32, max_position_embeddings=64, is_decoder=True)
    model = AutoModelForCausalLM.from_config(RoFormerConfig(**{**SMALL, **sizes})).eval()
    swap(model)
    with pytest.raises(NotImplementedError, match="takes no position_ids"):
        read_tree(model, short_prefix(model), random_ids(2, 3), [-1, 0, 0])


def test_static_layers_cannot_branch():
    model, ids = swapped("llama", keep=1), random_ids(2, 9)
    cache = StaticCache(config=model.config, max_cache_len=32)
    forward(model, ids, cache)
    with pytest.raises(NotImplementedError, match="StaticLayer"):
        read_tree(model, cache, ids, [-1] * 9)


def test_attention_without_masks_is_refused():
    AttentionInterface.register("maskless", ALL_ATTENTION_FUNCTIONS["sdpa"])
    model = swapped("llama", keep=1)
    cache = short_prefix(model)
    hooks = dict(model.model.layers[-1].self_attn._forward_pre_hooks)
    model.config._attn_implementation_internal = "maskless"
    try:
        with pytest.raises(NotImplementedError, match="LlamaAttention attends without a 4-D mask"):
            read_tree(model, cache, random_ids(2, 3), [-1, 0, 0])
    finally:
        AttentionInterface._global_mapping.pop("maskless")
    assert model.model.layers[-1].self_attn._forward_pre_hooks == hooks
