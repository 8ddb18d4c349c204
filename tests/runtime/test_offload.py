"""Models whose parameters accelerate keeps on the CPU or on disk compute what they compute in memory."""

import copy

import encoders
import pytest
import torch
from families import AUGMENTED, swapped
from forms import generate, tokens
from transformers import AutoModelForCausalLM, DynamicCache

import linearize_cli.runtime  # noqa: F401

accelerate = pytest.importorskip("accelerate", reason="accelerate offloads")
GROUP = {
    "local": {"scope": "group", "size": 8, "score": "relu2"},
    "far": {"feature_map": "identity"},
    "combine": "none",
    "conv": {"width": 4},
}
METHODS = {
    "sliding": AUGMENTED,
    "sliding, weighted keys": {**AUGMENTED, "far": {**AUGMENTED["far"], "key_weight": True}},
    "group": GROUP,
    "delta": {"far": {"feature_map": "hedgehog"}, "memory": {"kind": "delta"}, "combine": "rms"},
    "far alone": {"far": {"feature_map": "hedgehog"}, "combine": "shared"},
    "performer": {**AUGMENTED, "far": {"feature_map": "performer"}},
    "linformer": {**AUGMENTED, "far": {"feature_map": "linformer", "feature_dim": 8}, "combine": "gate"},
}


def on_meta(model) -> bool:
    return all(p.is_meta for name, p in model.named_parameters() if "linear_attention" in name)


@torch.no_grad()
def results(model, ids):
    """Logits of a prefill, of single tokens and of a tree, those after its commit and after a crop, and a text."""
    cache = DynamicCache(config=model.config)
    found = [model(ids[:, :20], past_key_values=cache).logits]
    found.append(model(ids[:, 20:21], past_key_values=cache).logits)
    tree = model.read_tree(cache, ids[:, 21:25], (-1, 0, 0, 2))
    tree.commit([0, 2, 3])
    found += [tree.logits, model(ids[:, 25:26], past_key_values=cache).logits]
    cache.activate_past_recording()
    model(ids[:, 26:30], past_key_values=cache)
    cache.crop(-3)
    found += [model(ids[:, 30:], past_key_values=cache).logits, generate(model, ids)]
    return found


def offloaded(model, how, folder):
    if how == "cpu":
        return accelerate.cpu_offload(copy.deepcopy(model), execution_device="cpu")
    if how == "cpu, buffers too":
        return accelerate.cpu_offload(copy.deepcopy(model), execution_device="cpu", offload_buffers=True)
    if how == "disk":
        return accelerate.disk_offload(
            copy.deepcopy(model), str(folder / "offloaded"), execution_device="cpu"
        )
    model.save_pretrained(folder / "saved")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" for i in range(4)}
    loading = dict(device_map=places, offload_folder=str(folder / "offloaded"))
    return AutoModelForCausalLM.from_pretrained(folder / "saved", **loading).eval()


@pytest.mark.parametrize("method", METHODS)
def test_offloaded_parameters_are_those_in_memory(method, tmp_path):
    model, ids = swapped("llama", METHODS[method]), tokens(2, 40)
    away = offloaded(model, "cpu", tmp_path)
    for _ in range(2):
        for actual, expected in zip(results(away, ids), results(model, ids), strict=True):
            assert torch.equal(actual, expected)
        assert on_meta(away)


@pytest.mark.parametrize("how", ["cpu, buffers too", "disk", "device map"])
def test_every_way_of_offloading(how, tmp_path):
    model, ids = swapped("llama", METHODS["performer"], keep=1), tokens(2, 40)
    away = offloaded(model, how, tmp_path)
    for actual, expected in zip(results(away, ids), results(model, ids), strict=True):
        assert torch.equal(actual, expected)
    assert on_meta(away)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_offloaded_encoders(family):
    attention = {**AUGMENTED, "cross": "linear"} if family == "t5" else AUGMENTED
    changes = {"num_layers": 3} if family == "t5" else {}
    model, ids = encoders.swapped(family, attention, **changes), torch.arange(5, 45)[None]
    given = {"decoder_input_ids": ids} if family == "t5" else {}
    away = accelerate.cpu_offload(copy.deepcopy(model), execution_device="cpu")
    with torch.no_grad():
        assert torch.equal(away(input_ids=ids, **given).logits, model(input_ids=ids, **given).logits)
    assert on_meta(away)
    if family == "t5":
        assert torch.equal(*(m.generate(input_ids=ids, max_new_tokens=5) for m in (away, model)))


def test_hooks_are_as_they_were_after_a_failure():
    model = swapped("llama", num_hidden_layers=1)
    away = accelerate.cpu_offload(copy.deepcopy(model), execution_device="cpu")
    mask = torch.zeros(1, 1, 6, 6, dtype=torch.bool)
    mask[..., 0] = True
    mask |= torch.eye(6, dtype=torch.bool)
    with pytest.raises(ValueError, match="cannot follow this 4-D attention mask"):
        away(tokens(1, 6), attention_mask=mask)
    with torch.no_grad():
        assert torch.equal(away(tokens(1, 6)).logits, model(tokens(1, 6)).logits)
    assert on_meta(away)
