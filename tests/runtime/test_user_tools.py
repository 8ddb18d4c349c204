"""Tools around a model of transformers work with an artifact too, or are refused in one sentence."""

import copy
import threading

import pytest
import torch
from families import swapped, tiny_model
from forms import close, tokens
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, TorchAoConfig
from user_case import KEEP, generate, run

from linearize_cli.runtime.model import AUTO_MODELS


def gradients(model, loss) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@KEEP
def test_training_on_a_cache(keep):
    """At once, and in pieces that follow one another."""
    model, ids = swapped("llama", keep=keep).train(), tokens()
    expected = gradients(model, model(ids, use_cache=False).logits.square().mean())
    torch.testing.assert_close(gradients(model, model(ids, use_cache=True).logits.square().mean()), expected)
    cache = DynamicCache(config=model.config)
    pieces = [model(part, past_key_values=cache).logits for part in ids.split(11, 1)]
    actual = gradients(model, torch.cat(pieces, 1).square().mean())
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-4)


@KEEP
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(keep, reentrant):
    model, ids = swapped("llama", keep=keep).train(), tokens()
    expected = gradients(model, model(ids, labels=ids).loss)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    torch.testing.assert_close(gradients(model, model(ids, labels=ids).loss), expected)


@KEEP
def test_training_after_inference_mode(keep):
    model, ids = swapped("llama", keep=keep), tokens()
    expected = run(model, ids)
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, expected)
        generate(model, ids)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@KEEP
def test_threads(keep):
    model, ids, found = swapped("llama", keep=keep), tokens(), []
    expected = generate(model, ids)
    threads = [threading.Thread(target=lambda: found.append(generate(model, ids))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and all(torch.equal(x, expected) for x in found)


@KEEP
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(target_modules="all-linear"),
        dict(target_modules=["q_proj", "v_proj"], use_dora=True),
        dict(target_modules=["q_proj"], modules_to_save=["linear_attention"]),
    ],
)
def test_lora(options, keep, tmp_path):
    peft = pytest.importorskip("peft")
    model, ids = swapped("llama", keep=keep), tokens()
    tuned = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(init_lora_weights=False, **options)
    ).eval()
    expected = run(tuned, ids)
    tuned.save_pretrained(tmp_path)
    assert torch.equal(
        run(peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval(), ids), expected
    )
    close(run(tuned.merge_and_unload(), ids), expected)


@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_lora_without_targets(base):
    """PEFT's default modules are those of the base model."""
    peft = pytest.importorskip("peft")
    tuned, expected = (peft.get_peft_model(make(base), peft.LoraConfig()) for make in (swapped, tiny_model))
    assert tuned.targeted_module_names == expected.targeted_module_names


@KEEP
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig"])
def test_virtual_tokens(kind, keep):
    peft = pytest.importorskip("peft")
    model, ids = swapped("llama", keep=keep), tokens()
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    tuned = peft.get_peft_model(model, config).eval()
    if kind == "PrefixTuningConfig":
        with pytest.raises(RuntimeError, match="keys and values, of another model or of prefix tuning"):
            run(tuned, ids)
        return
    assert run(tuned, ids).shape[1] == ids.shape[1] + 3
    assert tuned.generate(input_ids=ids, max_new_tokens=3, min_new_tokens=3, pad_token_id=0).shape[1] >= 3


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, **given):
        return self.model(ids, use_cache=False, **given).logits


def exported(model, ids, given=None, **options):
    return torch.export.export(Logits(model), (ids,), given, strict=False, **options).module()


@pytest.mark.parametrize(
    ("name", "keep"),
    [
        ("position_ids", 0),
        *(pytest.param(*x, marks=pytest.mark.slow) for x in ((None, 0), ("attention_mask", 0), (None, 1))),
    ],
)
def test_export(name, keep):
    model, ids = swapped("llama", keep=keep, num_hidden_layers=1 + keep), tokens()
    values = {"attention_mask": torch.ones_like(ids), "position_ids": torch.arange(ids.shape[1])[None]}
    given = {} if name is None else {name: values[name]}
    program = exported(model, ids, given)
    close(program(ids, **given), run(model, ids))
    if name == "position_ids":
        with pytest.raises(RuntimeError, match="position_ids must not start again"):
            program(ids, position_ids=values[name].remainder(9))


def test_what_export_refuses():
    model, ids = swapped("llama", num_hidden_layers=1), tokens()
    lengths = {"ids": {1: torch.export.Dim("length", min=2, max=200)}}
    with pytest.raises(ValueError, match="with a fixed number of tokens"):
        exported(model, ids, dynamic_shapes=lengths)
    mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    with pytest.raises(ValueError, match="an attention mask of 2 dimensions"):
        exported(model, ids, {"attention_mask": mask})


@pytest.mark.parametrize("entry", [*AUTO_MODELS.values(), None])
def test_servers_with_a_cache_of_their_own_are_told_not_to_run_it(entry):
    """SGLang asks the class that `auto_map` names, and takes a missing answer for yes."""
    found = entry or type(swapped("llama", num_hidden_layers=1))
    assert not found.is_backend_compatible() and not found._supports_attention_backend


@KEEP
def test_dynamic_quantisation(keep):
    model, ids = swapped("llama", keep=keep), tokens()
    small = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    difference = (run(small, ids) - run(model, ids)).abs().mean() / run(model, ids).abs().mean()
    assert difference < 0.2
    assert generate(small, ids).shape == generate(model, ids).shape


@KEEP
def test_torchao(keep, tmp_path):
    """Quantise a model in memory, and one while it is loaded."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model, ids = swapped("llama", keep=keep), tokens()
    model.save_pretrained(tmp_path)
    config = quantization.Int8WeightOnlyConfig()
    small = copy.deepcopy(model)
    quantization.quantize_(small, config)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=TorchAoConfig(config)).eval()
    for other in (small, loaded):
        difference = (run(other, ids) - run(model, ids)).abs().mean() / run(model, ids).abs().mean()
        assert difference < 0.2
        assert generate(other, ids).shape == generate(model, ids).shape


@KEEP
def test_bitsandbytes(keep, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import BitsAndBytesConfig

    model, ids = swapped("llama", keep=keep), tokens()
    model.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_8bit=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config).eval()
    assert (run(loaded, ids) - run(model, ids)).abs().mean() / run(model, ids).abs().mean() < 0.2
    assert generate(loaded, ids).shape == generate(model, ids).shape


DRAFTS = {
    "early exit": lambda: dict(assistant_early_exit=2),
    "lookup": lambda: dict(prompt_lookup_num_tokens=3),
    "a softmax model": lambda: dict(assistant_model=tiny_model("llama")),
    "another artifact": lambda: dict(assistant_model=swapped("llama", num_hidden_layers=1)),
}


@KEEP
@pytest.mark.parametrize("kind", DRAFTS)
def test_drafts_leave_the_text_and_the_model_as_they_are(kind, keep):
    model, ids = swapped("llama", keep=keep), tokens(1)
    expected = generate(model, ids)
    for _ in range(2):
        assert torch.equal(generate(model, ids, **DRAFTS[kind]()), expected)
    assert torch.equal(generate(model, ids), expected)
    with pytest.raises(ValueError, match="not supported with Static cache"):
        generate(model, ids, cache_implementation="static", **DRAFTS[kind]())


@pytest.mark.parametrize("name", ["eager", "sdpa"])
@KEEP
def test_attention_implementations_are_those_of_the_softmax_layers(name, keep, tmp_path):
    model, ids = swapped("llama", keep=keep), tokens()
    model.save_pretrained(tmp_path)
    expected = run(model, ids)
    close(run(AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name), ids), expected)
    model.set_attn_implementation(name)
    close(run(model, ids), expected)
    with pytest.raises(ValueError, match="does not support"):
        model.set_attn_implementation("flex_attention")
