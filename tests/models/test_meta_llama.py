"""Meta's Llama format gives the same logits as the Hugging Face checkpoint, or is refused by name."""

import json
import os
from pathlib import Path

import pytest
import torch
from meta_format import PARAMS, meta_shards, tiny_llama, write_byte_tokenizer, write_meta
from safetensors.torch import load_file
from tiny_checkpoint import Malicious
from transformers import LlamaForCausalLM

from linearize_cli.errors import UserError
from linearize_cli.models.load import load_teacher
from linearize_cli.models.meta_llama import is_meta_folder, load_meta_llama

STORIES = Path(__file__).parents[3] / "shared/checkpoints/stories260k-llama"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two shards of a tiny model with grouped-query attention, and no tokenizer."""
    model = tiny_llama()
    return write_meta(tmp_path / "llama", meta_shards(model.state_dict(), model.config, 2, 1))


def edit(folder: Path, index: int, change) -> Path:
    """Applies `change` to shard `index` on disk."""
    file = folder / f"consolidated.{index:02d}.pth"
    shard = torch.load(file)
    change(shard)
    torch.save(shard, file)
    return file


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_meta_llama(folder)
    assert caught.value.hint, "says what to do next"
    return str(caught.value)


def same_logits(a: LlamaForCausalLM, b: LlamaForCausalLM) -> None:
    ids = torch.randint(a.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(a(ids).logits, b(ids).logits, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("shards", "embedding_axis"), [(1, 1), (2, 1), (2, 0)])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_of_a_tiny_model(tmp_path, shards, embedding_axis, tied):
    model = tiny_llama(tie_word_embeddings=tied)
    write_meta(tmp_path, meta_shards(model.state_dict(), model.config, shards, embedding_axis))
    loaded = load_meta_llama(tmp_path)
    assert not loaded.training
    assert loaded.config.tie_word_embeddings is tied
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    same_logits(loaded, model)


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"{STORIES.name} is not at hand")
@pytest.mark.parametrize("shards", [1, 2])
def test_logits_of_a_real_model(tmp_path, shards):
    model = LlamaForCausalLM.from_pretrained(STORIES).eval()
    params = {"dim": 64, "n_layers": 5, "n_heads": 8, "n_kv_heads": 4, "norm_eps": 1e-5, "max_seq_len": 512}
    weights = load_file(STORIES / "model.safetensors")
    write_meta(tmp_path, meta_shards(weights, model.config, shards, 0), params)
    loaded = load_meta_llama(tmp_path)
    assert loaded.config.max_position_embeddings == 512
    same_logits(loaded, model)


def test_dtype(tmp_path):
    model = tiny_llama().to(torch.bfloat16)
    write_meta(tmp_path, meta_shards(model.state_dict(), model.config, 2, 1))
    assert {p.dtype for p in load_meta_llama(tmp_path).parameters()} == {torch.bfloat16}
    loaded = load_meta_llama(tmp_path, torch.float32)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32} and loaded.dtype == torch.float32


def test_load_teacher(tmp_path):
    """The way of every command: model and tokenizer, whose special tokens become the model's."""
    model = tiny_llama(vocab_size=512)
    write_meta(tmp_path, meta_shards(model.state_dict(), model.config, 2, 0))
    write_byte_tokenizer(tmp_path)
    loaded, tokenizer = load_teacher(str(tmp_path))
    same_logits(loaded, model)
    assert tokenizer.encode("hi") == [256, *b"hi"]
    for config in (loaded.config, loaded.generation_config):
        assert (config.bos_token_id, config.eos_token_id) == (256, 257)
    assert load_teacher(str(tmp_path), dtype="bfloat16")[0].dtype == torch.bfloat16
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(UserError, match="tokenizer.model is missing"):
        load_teacher(str(tmp_path))


def test_trains_without_touching_the_files(folder):
    before = {file: file.read_bytes() for file in folder.iterdir()}
    model = load_meta_llama(folder)
    model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("extra", "context"),
    [
        ({}, 4096),
        ({"rope_theta": 500000.0}, 8192),
        ({"rope_theta": 1000000}, 16384),
        ({"rope_theta": 500000.0, "use_scaled_rope": True}, 131072),
        ({"rope_theta": 500000.0, "use_scaled_rope": True, "max_seq_len": 1024}, 1024),
    ],
)
def test_context(folder, extra, context):
    (folder / "params.json").write_text(json.dumps(PARAMS | extra))
    assert load_meta_llama(folder).config.max_position_embeddings == context


def test_scaled_rope(tmp_path):
    """Llama 3.1's scaling (factor 8) changes the low frequencies as transformers' own `llama3` does."""
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    model = tiny_llama(rope_parameters=rope, max_position_embeddings=131072)
    params = PARAMS | {"rope_theta": 500000.0, "use_scaled_rope": True, "rope_scaling_factor": 8}
    write_meta(tmp_path, meta_shards(model.state_dict(), model.config, 1, 1), params)
    loaded = load_meta_llama(tmp_path)
    assert torch.equal(loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert not torch.equal(loaded.model.rotary_emb.inv_freq, tiny_llama().model.rotary_emb.inv_freq)


def test_scaled_rope_factor_follows_the_released_models(folder):
    """A narrow model with scaled RoPE is a Llama 3.2: factor 32."""
    (folder / "params.json").write_text(json.dumps(PARAMS | {"use_scaled_rope": True}))
    assert load_meta_llama(folder).config.rope_parameters["factor"] == 32.0


def test_is_meta_folder(folder, tmp_path):
    assert is_meta_folder(folder) and is_meta_folder(str(folder))
    assert not is_meta_folder(tmp_path) and not is_meta_folder(tmp_path / "absent")
    (folder / "config.json").write_text("{}")
    assert not is_meta_folder(folder)


def test_no_shard(folder):
    for file in folder.glob("*.pth"):
        file.unlink()
    message = refusal(folder)
    assert str(folder / "consolidated.00.pth") in message and "missing" in message and "Download" in message


def test_first_shard_missing(folder):
    (folder / "consolidated.00.pth").unlink()
    message = refusal(folder)
    assert str(folder / "consolidated.00.pth") in message and "consolidated.01.pth" in message


def test_last_shard_missing(folder):
    (folder / "consolidated.01.pth").unlink()
    message = refusal(folder)
    assert str(folder / "consolidated.00.pth") in message and "2 shard(s)" in message and "not 1" in message


def test_one_shard_too_many(folder):
    (folder / "consolidated.02.pth").write_bytes((folder / "consolidated.01.pth").read_bytes())
    message = refusal(folder)
    assert str(folder) in message and "2 shard(s)" in message and "not 3" in message


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.99])
def test_truncated_shard(folder, keep):
    file = folder / "consolidated.01.pth"
    size = int(keep * file.stat().st_size) if isinstance(keep, float) else keep
    os.truncate(file, size)
    message = refusal(folder)
    assert str(file) in message and "cannot be read" in message and "Download" in message


def test_pickled_code_does_not_run(folder, tmp_path):
    marker = tmp_path / "marker"
    file = edit(folder, 1, lambda shard: shard.update({"evil": Malicious(marker)}))
    message = refusal(folder)
    assert not marker.exists()
    assert str(file) in message and "not run" in message
    torch.load(file, weights_only=False)
    assert marker.exists(), "the pickle is harmless: the test proves nothing"


@pytest.mark.parametrize("content", [["a list"], {"a": "mapping"}, torch.ones(2)])
def test_shard_that_is_no_mapping_of_tensors(folder, content):
    file = folder / "consolidated.00.pth"
    torch.save(content, file)
    message = refusal(folder)
    assert str(file) in message and "not a mapping" in message


def test_unexpected_tensor(folder):
    file = edit(folder, 1, lambda shard: shard.update({"layers.0.feed_forward.gate.weight": torch.ones(2)}))
    message = refusal(folder)
    assert str(file) in message and "layers.0.feed_forward.gate.weight" in message


def test_missing_tensors(folder):
    file = edit(folder, 1, lambda shard: [shard.pop(name) for name in list(shard) if "layers.1" in name])
    message = refusal(folder)
    assert str(file) in message and "layers.1.attention.wk.weight" in message and "and 4 more" in message


def test_shard_of_another_model(folder):
    file = edit(folder, 0, lambda shard: shard.pop("tok_embeddings.weight"))
    message = refusal(folder)
    assert str(file) in message and "tok_embeddings.weight" in message


def test_wrong_shape(folder):
    def transpose(shard):
        shard["layers.1.attention.wv.weight"] = shard["layers.1.attention.wv.weight"].T

    file = edit(folder, 1, transpose)
    message = refusal(folder)
    assert str(file) in message and "attention.wv.weight is [32, 8]" in message and "[8, 32]" in message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n_kv_heads": 4}, "attention.wk.weight"),
        ({"n_layers": 3}, "n_layers is 3"),
        ({"n_layers": 1}, "n_layers is 1"),
        ({"dim": 40}, "tok_embeddings.weight"),
        ({"vocab_size": 49}, "vocab_size is 49"),
    ],
)
def test_params_at_odds_with_the_shards(folder, change, said):
    (folder / "params.json").write_text(json.dumps(PARAMS | change))
    message = refusal(folder)
    assert said in message and str(folder) in message


@pytest.mark.parametrize("key", ["dim", "n_layers", "n_heads", "norm_eps"])
def test_params_without_a_key(folder, key):
    (folder / "params.json").write_text(json.dumps({k: v for k, v in PARAMS.items() if k != key}))
    message = refusal(folder)
    assert str(folder / "params.json") in message and key in message


@pytest.mark.parametrize("text", ["", "{not json", "[1, 2]"])
def test_params_that_are_not_json(folder, text):
    (folder / "params.json").write_text(text)
    assert str(folder / "params.json") in refusal(folder)


def test_params_of_another_architecture(folder):
    """Mistral's window and Mixtral's experts use the same files; as a Llama they would give wrong numbers."""
    (folder / "params.json").write_text(json.dumps(PARAMS | {"sliding_window": 4096, "moe": {}}))
    message = refusal(folder)
    assert str(folder / "params.json") in message and "moe, sliding_window" in message
