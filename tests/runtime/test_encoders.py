"""Encoders and encoder-decoders: the swap, the forms of the swapped model, and conversion from end to end."""

import pytest
import torch
import transformers
from encoders import ENCODERS, SEQ2SEQ, swapped, tiny_model, tokenizer
from families import AUGMENTED

from linearize_cli.conversion.layer_selection import plan_layers
from linearize_cli.models.decoding import pad_right
from linearize_cli.models.tasks import task_of
from linearize_cli.runtime.cross import LinearizedCrossAttention
from linearize_cli.runtime.dispatch import attention_implementation, converted
from linearize_cli.runtime.model import linear_parameters

FAMILIES = {**ENCODERS, **SEQ2SEQ}
FLASH = {
    "local": {"scope": "group", "size": 8, "score": "relu2"},
    "far": {"feature_map": "identity"},
    "combine": "none",
    "conv": {"width": 5},
}
# Wider than any sequence here.
WINDOW = {"local": {"scope": "sliding", "size": 64, "score": "softmax"}, "combine": "shared"}
LENGTHS = (30, 1, 17, 9)
CROSS = {**AUGMENTED, "cross": "linear"}


def rows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, 84, (length,), generator=generator) for length in LENGTHS]


def batch(family: str) -> tuple[dict, torch.Tensor]:
    """Rows with pads on their right, and where a logit counts."""
    ids, mask = pad_right(rows(), pad_id=1)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if family in SEQ2SEQ:
        inputs |= {"decoder_input_ids": ids.roll(1, 1)}
    counted = mask[:, :1] if "classifier" in family else mask
    return inputs, counted > 0


def logits_of(model, family: str) -> torch.Tensor:
    inputs, counted = batch(family)
    logits = model(**inputs).logits
    return logits if logits.dim() == 2 else logits[counted]


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert expected.isfinite().all() and expected.std() > 0.01
    atol = tolerance * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_window_that_sees_all_is_the_base_model(family):
    """Scale, biases and pads are the base's: only far tokens may tell the two apart."""
    changes = {"local_attention": 128} if "modernbert" in family else {}
    model = swapped(family, WINDOW, **changes)
    with torch.no_grad():
        logits = logits_of(model, family)
        with attention_implementation(model, tiny_model(family).config._attn_implementation):
            base = logits_of(model, family)
    close(logits, base)


@pytest.mark.parametrize("attention", [AUGMENTED, FLASH], ids=["augmented", "flash"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pads_change_nothing(family, attention):
    model = swapped(family, attention)
    task = task_of(model, tokenizer())
    with torch.no_grad():
        for row, logits in zip(rows(), task.read(model, rows(), extra=3), strict=True):
            close(logits, task.read(model, [row])[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_both_sides_are_seen(family):
    """A token far ahead of the window moves the first logits, of an encoder; none does in a decoder."""
    model, row = swapped(family), rows()[0]
    other = row.clone()
    other[-1] = row[0]
    task = task_of(model, tokenizer())
    with torch.no_grad():
        assert not torch.allclose(task.read(model, [row])[0][0], task.read(model, [other])[0][0], atol=1e-6)
    if family in SEQ2SEQ:
        with torch.no_grad():
            decoder, _, _ = task.start(model, [row])
            close(decoder(other[None])[:, :-1], decoder(row[None])[:, :-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_every_new_parameter(family):
    model = swapped(family).train()
    logits_of(model, family).square().mean().backward()
    assert linear_parameters(model)
    for name, parameter in model.named_parameters():
        if "linear_attention" in name:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_models_are_the_same(family, tmp_path):
    model = swapped(family)
    model.save_pretrained(tmp_path)
    task = task_of(model, tokenizer())
    reloaded, info = getattr(transformers, task.auto_class).from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert type(reloaded) is type(model) and reloaded.config.linearize == model.config.linearize
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(logits_of(reloaded.eval(), family), logits_of(model, family))
    if task.auto_class != "AutoModelForCausalLM":
        with pytest.raises(ValueError, match=f"load it with {task.auto_class}"):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_decoding_is_one_forward(family):
    model, sources = swapped(family), rows()
    task, ids = task_of(model, tokenizer()), torch.stack([rows()[0], rows()[0].flip(0)])
    with torch.no_grad():
        decoder, _, _ = task.start(model, sources[:1])
        full = decoder(ids)
        for sizes in ([1] * 30, [11, 1, 5, 13]):
            cache = decoder.new_cache()
            close(torch.cat([decoder(part, cache) for part in ids.split(sizes, 1)], 1), full)


@pytest.mark.parametrize("attention", [AUGMENTED, CROSS], ids=["augmented", "cross"])
@pytest.mark.parametrize("family", SEQ2SEQ)
def test_generate(family, attention):
    # With fewer layers in T5's encoder, transformers makes too short a cache.
    model = swapped(family, attention, **({"num_decoder_layers": 2} if family == "t5" else {}))
    ids, mask = pad_right(rows(), pad_id=1)
    options = {"max_new_tokens": 20, "min_new_tokens": 20}
    for choice in ({}, {"num_beams": 2}):
        cached = model.generate(input_ids=ids, attention_mask=mask, **options, **choice)
        plain = model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **options, **choice)
        assert torch.equal(cached, plain)
    alone = model.generate(input_ids=rows()[2][None], **options)
    assert torch.equal(alone, model.generate(input_ids=ids, attention_mask=mask, **options)[2:3])


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_linear_cross_attention(family):
    """Against the definition, one weight after the other; pads of the source and the cache change nothing."""
    model = swapped(family, CROSS)
    task, seen = task_of(model, tokenizer()), []
    module = next(
        m for m in converted(model).values() if isinstance(m.linear_attention, LinearizedCrossAttention)
    )
    hook = module.linear_attention.register_forward_hook(lambda _, args, out: seen.append((args, out)))
    inputs, _ = batch(family)
    with torch.no_grad():
        model(**inputs)
        (q, k, v, _), out = seen[0]
        far = module.linear_attention.far
        weights = far.q_map(q) @ far.keys(k).transpose(-1, -2)
        for row, length in enumerate(LENGTHS):
            own = weights[row, :, :, :length]
            expected = (own / own.sum(-1, keepdim=True)) @ v[row, :, :length]
            close(out[row].transpose(0, 1), expected)
        hook.remove()
        for row, logits in zip(rows(), task.read(model, rows(), extra=3), strict=True):
            close(logits, task.read(model, [row])[0])
        decoder, ids, cache = task.start(model, rows()[:1])[0], rows()[0][None].expand(2, -1), None
        cache = decoder.new_cache()
        parts = torch.cat([decoder(part, cache) for part in ids.split([11, 1, 18], 1)], 1)
        close(parts, decoder(ids))
    layer = cache.cross_attention_cache.layers[module.layer_idx]
    assert layer.nbytes() == 2 * 4 * 16 * (8 + 1) * 4  # rows, heads, features, values and the mass, fp32
    assert layer.keys.untyped_storage().nbytes() < 64


def test_the_plan_names_both_sides():
    layers = {layer.name: layer for layer in plan_layers(tiny_model("bart"))}
    encoder, decoder, cross = (
        layers["model.encoder.layers.0.self_attn"],
        layers["model.decoder.layers.0.self_attn"],
        layers["model.decoder.layers.0.encoder_attn"],
    )
    assert (encoder.refusal, encoder.causal, encoder.caches) == (None, False, False)
    assert (decoder.refusal, decoder.causal, decoder.caches) == (None, True, True)
    assert "causal" not in decoder.geometry
    assert (cross.refusal, cross.caches) == ("cross-attention: its keys come from another sequence", False)
    assert len(converted(swapped("bart"))) == len(converted(swapped("t5"))) == 5
