"""4-D attention masks: pads and documents count, and any other mask is refused."""

import encoders
import pytest
import torch
from families import swapped
from forms import close, tokens
from transformers import DynamicCache, StaticCache

LENGTHS = (11, 1, 18)
LENGTH = sum(LENGTHS)
KEEP = pytest.mark.parametrize("keep", [0, 2])
LOWEST = torch.finfo(torch.float32).min


def documents(rows: int = 1, causal: bool = True) -> torch.Tensor:
    """The mask of documents of LENGTHS, one behind the other."""
    number = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    seen = number[:, None] == number
    return (seen.tril() if causal else seen).expand(rows, 1, -1, -1).clone()


def causal(length: int = LENGTH, past: int = 0) -> torch.Tensor:
    return torch.ones(1, 1, length, past + length, dtype=torch.bool).tril(past)


def additive(mask: torch.Tensor, lowest: float = LOWEST) -> torch.Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, lowest)


def run(model, ids, **given) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **given).logits


def alone(model, ids) -> torch.Tensor:
    """Logits of each document by itself, at its place in the row."""
    places = torch.arange(LENGTH)[None].split(LENGTHS, 1)
    parts = zip(ids.split(LENGTHS, 1), places, strict=True)
    return torch.cat([run(model, x, position_ids=p, use_cache=False) for x, p in parts], 1)


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize(
    ("family", "keep"),
    [("llama", 0), ("llama", 2), ("mistral", 0), ("gemma2", 0), ("llama4", 0), ("llama4", 2), ("gpt2", 2)],
)
def test_documents_in_a_mask_are_apart(family, keep, use_cache):
    changes = {"attention_chunk_size": 64} if keep else {}  # chunks that are no documents
    model, ids = swapped(family, keep=keep, **changes), tokens(2, LENGTH)
    given = dict(position_ids=torch.arange(LENGTH)[None], use_cache=use_cache)
    for mask in (
        documents(2),
        additive(documents(2)),
        additive(documents(), -1e9),
        additive(documents(), -1e4),
    ):
        close(run(model, ids, attention_mask=mask, **given), alone(model, ids))


@KEEP
def test_documents_beside_pads(keep):
    model, ids = swapped("llama", keep=keep), tokens(2, LENGTH)
    pads = torch.ones(2, LENGTH, dtype=torch.bool)
    pads[0, :4] = pads[0, 13:15] = False
    mask, positions = documents(2) & pads[:, None, None], torch.arange(LENGTH)[None]
    actual = run(model, ids, attention_mask=mask, position_ids=positions, use_cache=False)
    close(actual[1:], alone(model, ids[1:]))
    for part in (slice(4, 11), torch.arange(12, LENGTH)[[0, *range(3, 18)]]):
        row = dict(position_ids=positions[:, part], use_cache=True)  # without, gaps would begin documents
        close(actual[:1, part], run(model, ids[:1, part], **row))


@KEEP
def test_the_whole_row_is_in_the_cache_after_documents(keep):
    model, ids, rest = swapped("llama", keep=keep), tokens(2, LENGTH), tokens(2, 5)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    run(model, ids, attention_mask=documents(2), past_key_values=caches[0])
    run(model, ids, past_key_values=caches[1])
    if keep:  # the later layers' keys and values are those of the documents
        for layer in caches:
            assert layer.get_seq_length() == LENGTH
    else:
        first = model.model.layers[0].self_attn.layer_idx
        torch.testing.assert_close(*(cache.layers[first].state.S for cache in caches))
    assert run(model, rest, past_key_values=caches[0]).isfinite().all()


@KEEP
@pytest.mark.parametrize("static", [False, True])
def test_causal_masks_behind_a_cache(keep, static):
    model, ids = swapped("llama", keep=keep), tokens(1, LENGTH)
    expected = run(model, ids, use_cache=False)
    cache = StaticCache(model.config, LENGTH + 3) if static else DynamicCache(config=model.config)
    close(run(model, ids[:, :9], past_key_values=cache), expected[:, :9])
    for start, end in ((9, 20), (20, 21), (21, LENGTH)):
        mask = causal(end - start, start)
        mask = additive(torch.nn.functional.pad(mask, (0, LENGTH + 3 - end)) if static else mask)
        close(
            run(model, ids[:, start:end], attention_mask=mask, past_key_values=cache), expected[:, start:end]
        )


def changed(mask: torch.Tensor, row, column, seen: bool) -> torch.Tensor:
    mask = mask.clone()
    mask[..., row, column] = seen
    return mask


REFUSED = {
    "a token hidden from one other": (changed(causal(), 20, 3, False), "cannot follow"),
    "a band": (causal() & ~causal().tril(-7), "cannot follow"),
    "tokens ahead": (changed(causal(), slice(0, 9), slice(0, 9), True), "cannot follow"),
    "documents of two parts": (changed(documents(), slice(12, LENGTH), slice(0, 11), True), "cannot follow"),
    "biases": (additive(causal()) - 0.5, "cannot add the biases"),
    "a mask for each head": (
        torch.cat([causal()] * 3 + [documents()], 1),
        "one attention mask for all heads",
    ),
}


@KEEP
@pytest.mark.parametrize("kind", REFUSED)
def test_other_masks_are_refused(kind, keep):
    model, (mask, reason) = swapped("llama", keep=keep), REFUSED[kind]
    for use_cache in (False, True):
        with pytest.raises(ValueError, match=reason):
            run(model, tokens(1, LENGTH), attention_mask=mask, use_cache=use_cache)


@KEEP
@pytest.mark.parametrize("length", [1, 5])
def test_a_mask_that_hides_what_the_state_holds_is_refused(keep, length):
    model, cache = swapped("llama", keep=keep), DynamicCache()
    cache = DynamicCache(config=model.config)
    run(model, tokens(1, 9), past_key_values=cache)
    mask = changed(causal(length, 9), slice(None), slice(0, 4), False)
    with pytest.raises(ValueError, match="hides tokens that are in the cache"):
        run(model, tokens(1, length), attention_mask=mask, past_key_values=cache)


def test_a_mask_of_three_dimensions_is_refused():
    with pytest.raises(ValueError, match="2 or 4 dimensions, not 3"):
        run(swapped("llama"), tokens(1, LENGTH), attention_mask=causal()[0])


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_documents_of_encoders_are_apart(family):
    model, ids = encoders.swapped(family), torch.randint(5, 80, (2, LENGTH))
    mask = documents(2, causal=False)
    places = torch.arange(LENGTH)[None]
    actual = run(model, ids, attention_mask=mask, position_ids=places)
    places = places.split(LENGTHS, 1)
    for x, part, place in zip(ids.split(LENGTHS, 1), actual.split(LENGTHS, 1), places, strict=True):
        close(part, run(model, x, position_ids=place))
    with pytest.raises(ValueError, match="cannot follow"):
        run(model, ids, attention_mask=changed(mask, 3, 25, True))


def test_a_linear_attention_to_an_encoder_takes_one_row_of_a_mask():
    attention = {**encoders.AUGMENTED, "cross": "linear"}
    model, ids = encoders.swapped("bart", attention), torch.randint(5, 80, (1, LENGTH))
    hidden = model.get_encoder()(ids)
    mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool)
    given = dict(encoder_outputs=hidden, decoder_input_ids=ids, use_cache=False)
    expected = run(model, None, **given)
    with torch.no_grad():
        decoder = model.get_decoder()
        read = dict(encoder_hidden_states=hidden[0], use_cache=False)
        same = decoder(ids, encoder_attention_mask=mask, **read)[0]
        torch.testing.assert_close(model.lm_head(same) + model.final_logits_bias, expected)
        with pytest.raises(ValueError, match="from every query"):
            decoder(ids, encoder_attention_mask=changed(mask, 3, 5, False), **read)
