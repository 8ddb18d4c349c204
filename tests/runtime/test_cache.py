"""The state in a transformers cache: its size, rollback, and what it refuses."""

import copy
from importlib.util import module_from_spec, spec_from_file_location

import pytest
import torch
from families import swapped
from forms import close, generate, incremental, tokens
from transformers import DynamicCache

from linearize_cli.runtime import cache as cache_module
from linearize_cli.runtime.cache import ROLLBACK, LinearCacheLayer
from linearize_cli.runtime.dispatch import attention_implementation


def state_bytes(cache) -> int:
    return sum(layer.nbytes() for layer in cache.layers if isinstance(layer, LinearCacheLayer))


@torch.no_grad()
def feed(model, cache, ids) -> torch.Tensor:
    return model(ids, past_key_values=cache, use_cache=True).logits


def test_state_has_the_same_size_at_any_length():
    model = swapped("llama", num_hidden_layers=2, max_position_embeddings=16384)
    ids, cache, sizes, seen = tokens(1, 10_000), DynamicCache(config=model.config), [], 0
    for length in (100, 1_000, 10_000):
        feed(model, cache, ids[:, seen : length - 1])
        feed(model, cache, ids[:, length - 1 : length])
        seen = length
        sizes.append(state_bytes(cache))
    assert cache.get_seq_length() == 10_000
    assert sizes[0] == sizes[1] == sizes[2] > 0
    assert not any(layer.keys.numel() for layer in cache.layers)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt-oss", "deepseek-v3"])
@pytest.mark.parametrize("keep", [0, 2])
def test_rollback_leaves_no_trace(family, keep):
    model, ids = swapped(family, keep=keep), tokens(2, 80)
    cache = model(ids[:, :13], use_cache=True).past_key_values
    cache.activate_past_recording()
    kept, wrong = ids[:, :13], tokens(2, 200)[:, 100:]
    for turn in range(5):  # the kept tokens cross the window several times
        start = kept.shape[1]
        draft = torch.cat([ids[:, start : start + 7], wrong[:, 3 * turn : 3 * turn + 3]], 1)
        if turn % 2:
            feed(model, cache, draft)
        else:
            for t in range(10):
                feed(model, cache, draft[:, t : t + 1])
        cache.crop(-3)
        kept = torch.cat([kept, draft[:, :7]], 1)
        assert cache.get_seq_length() == kept.shape[1]
    logits = torch.cat([feed(model, cache, ids[:, t : t + 1]) for t in range(60, 80)], 1)
    with torch.no_grad():
        fresh = model(torch.cat([kept, ids[:, 60:]], 1)).logits
    close(logits, fresh[:, kept.shape[1] :])


def test_rollback_keeps_pads_apart():
    model, ids = swapped("llama"), tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)

    def step(cache, start, end):
        padding = dict(attention_mask=mask[:, :end], position_ids=positions[:, start:end])
        with torch.no_grad():
            return model(ids[:, start:end], past_key_values=cache, use_cache=True, **padding)

    cache = DynamicCache(config=model.config)
    step(cache, 0, 4)
    cache.activate_past_recording()
    step(cache, 4, 20)
    cache.crop(-13)  # back into the first row's pads
    close(step(cache, 7, 40).logits, incremental(model, ids, [40], mask)[:, 7:])


def test_rollback_is_bounded():
    model, ids = swapped("llama", num_hidden_layers=1, max_position_embeddings=1024), tokens(1, 700)
    cache = model(ids[:, :5], use_cache=True).past_key_values
    cache.activate_past_recording()
    for start, end in ((5, 105), (105, 600), (600, 601)):
        feed(model, cache, ids[:, start:end])
    assert cache.layers[0].trail[0].shape[-2] == ROLLBACK
    with pytest.raises(RuntimeError, match=f"at most {ROLLBACK}"):
        cache.crop(-ROLLBACK - 1)
    cache.crop(-ROLLBACK)
    with torch.no_grad():
        fresh = model(ids).logits
    close(feed(model, cache, ids[:, 601 - ROLLBACK :]), fresh[:, 601 - ROLLBACK :])


def test_crop_says_what_is_missing():
    model = swapped("llama")
    cache = model(tokens(), use_cache=True).past_key_values
    cache.crop(0)
    with pytest.raises(RuntimeError, match=r"activate_past_recording\(\)"):
        cache.crop(-1)
    cache.activate_past_recording()
    feed(model, cache, tokens()[:, :4])
    with pytest.raises(ValueError, match="negative number"):
        cache.crop(3)
    cache.crop(-2)
    with pytest.raises(RuntimeError, match="last crop"):
        cache.crop(-1)


def test_a_cache_of_softmax_attention_is_refused():
    model, ids = swapped("llama"), tokens()
    with attention_implementation(model, "sdpa"):
        teacher = model(ids, use_cache=True)
    assert not any(isinstance(layer, LinearCacheLayer) for layer in teacher.past_key_values.layers)
    with pytest.raises(
        RuntimeError, match="layer 0 .* keys and values, of another model or of prefix tuning"
    ):
        feed(model, teacher.past_key_values, ids[:, :1])


def test_a_cache_of_another_conversion_is_refused():
    """Each way round: where one model keeps a state, the other keeps keys and values."""
    models, ids = (swapped("llama"), swapped("llama", keep=1)), tokens()
    for model, other in (models, models[::-1]):
        with pytest.raises(
            RuntimeError, match="layer 3 of the cache holds (a state|keys and values), of another model"
        ):
            feed(model, other(ids, use_cache=True).past_key_values, ids[:, :1])


def test_a_cache_of_another_copy_of_the_code_is_refused():
    """Check two artifacts in one process, each of which runs its own code."""
    spec = spec_from_file_location("another_copy", cache_module.__file__)
    other = module_from_spec(spec)
    spec.loader.exec_module(other)
    model, ids = swapped("llama"), tokens()
    cache = model(ids, use_cache=True).past_key_values
    cache.layers[0].__class__ = other.LinearCacheLayer
    with pytest.raises(RuntimeError, match=r"a state of another copy of the linearize code \(another_copy\)"):
        feed(model, cache, ids[:, :1])
    with pytest.raises(NotImplementedError, match="LinearCacheLayer of another_copy"):
        model.read_tree(cache, ids[:, :1], [-1])


def test_a_reset_cache_starts_anew():
    model, ids = swapped("llama", keep=1), tokens()
    cache = model(ids, use_cache=True).past_key_values
    cache.reset()
    assert cache.get_seq_length() == 0 and state_bytes(cache) == 0
    assert torch.equal(feed(model, cache, ids), model(ids).logits)


@pytest.mark.parametrize("keep", [0, 2])
def test_a_copied_cache_goes_its_own_way(keep):
    model, ids = swapped("llama", keep=keep), tokens(1, 60)
    with torch.no_grad():
        prefix = model(ids[:, :20], use_cache=True).past_key_values
        branches = [torch.cat([ids[:, :20], rest], 1) for rest in (ids[:, 20:40], ids[:, 40:])]
        for branch in branches:
            logits = feed(model, copy.deepcopy(prefix), branch[:, 20:])
            close(logits, model(branch).logits[:, 20:])


@pytest.mark.parametrize("keep", [0, 2])
def test_rows_follow_the_batch(keep):
    """Select, repeat and reorder act on the state as on keys and values."""
    model, ids = swapped("llama", keep=keep), tokens(3, 40)
    with torch.no_grad():
        full = model(ids).logits[:, 30:]
        cache = model(ids[:, :30], use_cache=True).past_key_values
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)  # rows 2, 2, 0, 0
    cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
    rows = torch.tensor([0, 2, 2, 0])
    close(feed(model, cache, ids[rows, 30:]), full[rows])


@pytest.mark.parametrize("keep", [0, 2])
def test_assisted_generation_is_exact(keep):
    """Check the model as target of prompt lookup, of a draft model and of its own first layers, and as draft."""
    model, other, ids = swapped("llama", keep=keep), swapped("mistral"), tokens(1)
    greedy = generate(model, ids, max_new_tokens=40)
    assert torch.equal(generate(model, ids, max_new_tokens=40, prompt_lookup_num_tokens=3), greedy)
    assert torch.equal(generate(model, ids, max_new_tokens=40, assistant_model=other), greedy)
    assert torch.equal(generate(model, ids, max_new_tokens=40, assistant_model=model), greedy)
    assert torch.equal(generate(model, ids, max_new_tokens=40, assistant_early_exit=2), greedy)


def test_parameters_written_behind_torchs_back_count_in_the_next_text():
    """`parameter.data` writes change no version counter; a new text must not decode with cached products."""
    model, ids = swapped("llama"), tokens(length=20)
    with torch.no_grad():
        incremental(model, ids, [12] + [1] * 8)
        for name, parameter in model.named_parameters():
            if "linear_attention" in name:
                parameter.data.add_(0.3 * torch.randn_like(parameter))
        close(incremental(model, ids, [12] + [1] * 8), model(ids).logits)
