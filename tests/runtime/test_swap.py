"""The generic swap on tiny random models of many families: what a converted model must do on any base."""

import copy
import pickle

import pytest
import torch
from families import AUGMENTED, CONVERTED, swapped, tiny_model
from forms import (
    LENGTH,
    PADS,
    check_family,
    check_forms,
    check_gradients,
    check_wide_window,
    close,
    generate,
    incremental,
    padded_tokens,
    tokens,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from linearize_cli.runtime.dispatch import converted
from linearize_cli.runtime.model import linear_parameters

FLASH = {
    "local": {"scope": "group", "size": 8, "score": "relu2"},
    "far": {"feature_map": "identity"},
    "combine": "none",
    "conv": {"width": 4},
}
# Families that between them have all that models differ in; the others face the longer tests in the slow set.
REPRESENTATIVE = (
    *("llama", "mistral", "gpt2", "opt", "gemma2", "gemma3n", "gpt-oss", "deepseek-v3", "qwen3-moe"),
    *("qwen3-next", "bert"),
)


def families(slow: bool) -> list:
    return [
        pytest.param(name, marks=[pytest.mark.slow] if slow and name not in REPRESENTATIVE else [])
        for name in CONVERTED
    ]


@pytest.mark.parametrize("family", CONVERTED)
def test_forms_agree(family):
    check_family(family, swapped(family))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_forms_agree_with_groups(family):
    check_forms(swapped(family, FLASH))


@pytest.mark.parametrize("family", families(slow=True))
def test_forms_agree_beside_kept_layers(family):
    keep = 1 if len(converted(swapped(family))) < 4 else 2
    model = swapped(family, keep=keep)
    assert len(model.config.linearize["softmax"]) >= keep
    check_family(family, model)


@pytest.mark.parametrize("family", CONVERTED)
def test_a_window_that_sees_all_is_the_base_model(family):
    wide = {"sliding_window": 64, "attention_chunk_size": 64}
    changes = {key: wide[key] for key in wide if key in CONVERTED[family][1]}
    check_wide_window(tiny_model(family, **changes))


@pytest.mark.parametrize("attention", [AUGMENTED, FLASH], ids=["augmented", "flash"])
@pytest.mark.parametrize("family", CONVERTED)
def test_gradients_reach_every_new_parameter(family, attention):
    check_gradients(swapped(family, attention))


def test_gradient_checkpointing_changes_no_gradient():
    grads = []
    for reentrant in (None, True, False):
        model = swapped("llama").train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(tokens(), use_cache=False).logits.square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


@pytest.mark.slow
@pytest.mark.parametrize("keep", [0, 2])
def test_compiles(keep):
    """One graph in training; decoding stays with the two of its first tokens."""
    model, ids = swapped("llama", keep=keep), tokens()
    torch._dynamo.reset()
    trained = torch.compile(model, backend="aot_eager", fullgraph=True)(ids, use_cache=False).logits
    trained.square().mean().backward()
    assert all(p.grad is not None for p in linear_parameters(model))
    with torch.no_grad():
        full = model(ids).logits
        close(trained, full)
        torch._dynamo.reset()
        step = torch.compile(model, backend="aot_eager")
        cache = model(ids[:, :10], use_cache=True).past_key_values
        with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
            for t in range(10, LENGTH):
                logits = step(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits
                close(logits[:, 0], full[:, t])


@pytest.mark.parametrize("family", families(slow=True))
def test_generate(family):
    model, (ids, mask) = swapped(family), padded_tokens()
    greedy = generate(model, ids, mask)
    assert torch.equal(greedy[:1], generate(model, ids[:1, PADS:]))
    for options in ({}, {"num_beams": 2}, {"do_sample": True}):
        cached = generate(model, ids, mask, **options)
        assert torch.equal(cached, generate(model, ids, mask, use_cache=False, **options)), options


def test_a_model_that_adds_biases_to_its_mask_generates_beside_pads():
    model, (ids, mask) = swapped("falcon-alibi"), padded_tokens()
    assert torch.equal(generate(model, ids, mask)[:1], generate(model, ids[:1, PADS:]))


@pytest.mark.parametrize("keep", [0, 2])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt-oss", "gpt2", "deepseek-v3"])
def test_static_cache(family, keep):
    model, (ids, mask) = swapped(family, keep=keep), padded_tokens()
    for _ in range(2):  # the second call may reset the first one's cache and use it again
        static = generate(model, ids, mask, cache_implementation="static")
        assert torch.equal(static, generate(model, ids, mask))


def saved_names(folder) -> set[str]:
    return set(load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("family", families(slow=True))
def test_saved_and_copied_models_are_the_same(family, tmp_path):
    model, ids = swapped(family, keep=1), tokens()
    with torch.no_grad():
        logits = model(ids).logits
        model.save_pretrained(tmp_path)
        reloaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert type(reloaded) is type(model)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert reloaded.config.linearize == model.config.linearize
        tiny_model(family).save_pretrained(tmp_path / "base")
        names = {name for name in saved_names(tmp_path) if "linear_attention" not in name}
        assert names == saved_names(tmp_path / "base")
        for twin in (reloaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(ids).logits, logits)
            close(incremental(twin, ids, [11, 1, 5, 13]), logits, 1e-4)


def test_parameters_missing_from_a_checkpoint_start_as_new(tmp_path):
    model = swapped("llama")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    base = {name: tensor for name, tensor in tensors.items() if "linear_attention" not in name}
    save_file(base, tmp_path / "model.safetensors", {"format": "pt"})
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for new, old in zip(linear_parameters(reloaded), linear_parameters(model), strict=True):
        assert not torch.equal(new, old)
    for module in converted(model).values():
        module.linear_attention.reset_parameters()
    for new, start in zip(linear_parameters(reloaded), linear_parameters(model), strict=True):
        assert torch.equal(new, start)


def test_new_parameters_stay_fp32(tmp_path):
    swapped("llama", keep=1).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if "linear_attention" in name else torch.bfloat16), name
    out = model(tokens(), use_cache=True)
    assert out.logits.dtype == torch.bfloat16 and out.logits.isfinite().all()
    state = out.past_key_values.layers[0].state
    assert state.S.dtype == torch.float32 and state.recent_k.dtype == torch.bfloat16
    generate(model, tokens())
    fresh = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    assert {p.dtype for p in linear_parameters(fresh)} == {torch.float32}


def test_continuous_batching_is_refused():
    for keep in (0, 2):
        model = swapped("llama", keep=keep)
        for attempt in (
            lambda model: model(tokens(), cache=object()),
            lambda model: model.generate_batch(tokens().tolist()),
            lambda model: model.init_continuous_batching(),
        ):
            with pytest.raises(NotImplementedError, match="continuous batching .* use model.generate()"):
                attempt(model)
