"""A GGUF file loads as the same model in a folder does, or is refused with the file and what to do."""

import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

gguf = pytest.importorskip("gguf", reason="GGUF files are read with the extra `gguf`")

from tiny_gguf import TEMPLATE, rounded, tiny_llama, write_gguf  # noqa: E402

from linearize_cli import convert, load  # noqa: E402
from linearize_cli.cli import main  # noqa: E402
from linearize_cli.conversion.convert import default_output  # noqa: E402
from linearize_cli.conversion.inspect import inspect  # noqa: E402
from linearize_cli.errors import Notice, UserError  # noqa: E402
from linearize_cli.models.find import resolve_model  # noqa: E402
from linearize_cli.models.load import load_shape, load_stored, load_teacher  # noqa: E402

IDS = torch.tensor([[1, 5, 9, 260, 40, 7, 33]])
LLAMA3 = dict(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0)


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture
def file(tmp_path, model) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", model)


def refusal(model: Path | str) -> str:
    """Return the message of the error, which the config alone and the whole model both give."""
    messages = []
    for loads in (load_shape, load_teacher):
        with pytest.raises(UserError) as caught:
            loads(str(model))
        assert caught.value.hint and caught.value.exit_code == 2
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    return messages[0]


def folder_of(loaded, tokenizer, folder: Path) -> Path:
    """Save a model and its tokenizer as a folder."""
    loaded.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [False, True])
def test_float32_is_the_same_model(tmp_path, tied, recwarn):
    model = tiny_llama(tie_word_embeddings=tied)
    loaded, tokenizer = load_teacher(str(write_gguf(tmp_path / "tiny.gguf", model)))
    assert not [warning for warning in recwarn if issubclass(warning.category, Notice)]
    assert type(loaded) is type(model) and loaded.dtype == torch.float32 and not loaded.training
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    assert loaded.name_or_path == tokenizer.name_or_path == str(tmp_path / "tiny.gguf")


def test_quantised_weights_are_dequantised(tmp_path, model):
    file = write_gguf(tmp_path / "tiny.gguf", model, "Q8_0")
    with pytest.warns(
        Notice, match=r"^tiny.gguf is quantised \(Q8_0\): .* dequantised to float32, and .* not"
    ):
        loaded, tokenizer = load_teacher(str(file))
    expected = rounded(tiny_llama(), "Q8_0")
    assert torch.equal(loaded(IDS).logits, expected(IDS).logits)
    assert not hasattr(loaded.config, "quantization_config") and not loaded.is_quantized
    folder = folder_of(loaded, tokenizer, tmp_path / "folder")
    assert load_file(folder / "model.safetensors").keys() == expected.state_dict().keys()
    assert torch.equal(load_teacher(str(folder))[0](IDS).logits, expected(IDS).logits)
    assert "gguf" not in (folder / "config.json").read_text() + (folder / "tokenizer_config.json").read_text()
    assert load_teacher(str(file), dtype="bfloat16")[0].dtype == torch.bfloat16


def test_half_precision_is_kept(tmp_path, model):
    file = write_gguf(tmp_path / "tiny.gguf", model, "F16")
    loaded, _ = load_stored(str(file))
    assert loaded.dtype == load_shape(str(file)).dtype == torch.float16
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float16}


def test_tokenizer(file):
    loaded, tokenizer = load_teacher(str(file))
    assert tokenizer.decode(tokenizer.encode("a fox sat")) == "a fox sat"
    assert tokenizer.encode("fox") == [260] and tokenizer.chat_template == TEMPLATE
    for config in (tokenizer, loaded.config, loaded.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, None)


def test_ids_that_the_file_lacks_are_not_made_up(tmp_path, model):
    """The class's default would be 1 and 2."""
    loaded, _ = load_teacher(str(write_gguf(tmp_path / "tiny.gguf", model, ids=False)))
    assert loaded.config.bos_token_id is loaded.config.eos_token_id is None


def test_files_beside_it_are_not_read(file):
    for name in ("tokenizer.json", "tokenizer_config.json", "adapter_config.json", "generation_config.json"):
        (file.parent / name).write_text("{not json")
    load_teacher(str(file))


def test_frequencies_of_llama_3(tmp_path):
    """llama.cpp stores them as divisors in a tensor, which transformers does not read."""
    rope = {**LLAMA3, "rope_theta": 5e5, "factor": 32.0, "original_max_position_embeddings": 8192}
    model = tiny_llama(rope_parameters=rope, head_dim=64)
    rotary = model.model.rotary_emb
    plain = 1 / 5e5 ** (torch.arange(0, 64, 2).float() / 64)
    divisors = (plain / rotary.inv_freq).numpy()
    assert divisors.min() == 1 and divisors.max() == pytest.approx(32)
    file = write_gguf(tmp_path / "tiny.gguf", model, tensors={"rope_freqs.weight": divisors})
    loaded, _ = load_teacher(str(file))
    assert torch.allclose(loaded.model.rotary_emb.inv_freq, rotary.inv_freq, rtol=1e-6)
    assert torch.allclose(loaded(IDS).logits, model(IDS).logits, atol=1e-6)
    odd = write_gguf(tmp_path / "odd.gguf", model, tensors={"rope_freqs.weight": divisors**0.5})
    assert f"{odd}: transformers does not read its RoPE scaling (rope_freqs)" in refusal(odd)
    yarn = write_gguf(tmp_path / "yarn.gguf", model, llama__rope__scaling__type="yarn")
    assert "its RoPE scaling (yarn)" in refusal(yarn)


def test_convert(tmp_path, model, monkeypatch):
    """The artifact of a GGUF file is that of the same model in a folder."""
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": "the fox sat on a box " * 4}) + "\n" for _ in range(20)))
    options = dict(overrides=("attention.local.size=4",), eval_data=str(text), seq_len=32, train=False)
    file = write_gguf(tmp_path / "tiny.gguf", model, "Q8_0")
    folder = folder_of(*load_teacher(str(file)), tmp_path / "folder")
    report = convert(str(file), **options)
    other = convert(str(folder), **options)
    assert report["output"] == "tiny-augmented" and report["base_model"] == str(file)
    for key in ("perplexity", "ablation", "layers", "kv_bytes_per_token"):
        assert report[key] == other[key], key
    artifact, tokenizer = load("tiny-augmented")
    assert torch.equal(artifact(IDS).logits, load("folder-augmented")[0](IDS).logits)
    assert tokenizer.encode("fox") == [260]
    assert "gguf" not in Path("tiny-augmented/config.json").read_text()
    card = Path("tiny-augmented/README.md").read_text()
    assert "`tiny.gguf`" in card


def test_config_alone(tmp_path, model):
    """inspect and the dry run say of a GGUF file what they say of the same model in a folder."""
    file = write_gguf(tmp_path / "tiny.gguf", model, "Q8_0")
    folder = folder_of(*load_teacher(str(file)), tmp_path / "folder")
    plans = [
        convert(str(model), tmp_path / "out", dry_run=True, flops=1e12, seq_len=32, memory=10**9)
        for model in (file, folder)
    ]
    seen = [inspect(str(model)) for model in (file, folder)]
    for one, other in (plans, seen):
        own = {"base_model", "model"}
        assert {k: v for k, v in one.items() if k not in own} == {
            k: v for k, v in other.items() if k not in own
        }
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("models/Tiny.Q4_1.gguf", "Tiny.Q4_1-augmented"),
        ("owner/name:Tiny.Q4_1.gguf", "Tiny.Q4_1-augmented"),
        ("owner/name:Q4/Tiny.gguf", "Tiny-augmented"),
        ("owner/name", "name-augmented"),
    ],
)
def test_default_output(name, output):
    assert default_output(name, "augmented") == Path(output)


def test_a_folder_with_one_file(file):
    (file.parent / "README.md").write_text("")
    assert resolve_model(str(file.parent)) == str(file)
    assert load_teacher(str(file.parent))[0].name_or_path == str(file.parent)
    file.with_name("other.gguf").write_bytes(b"")
    message = refusal(file.parent)
    assert "holds several GGUF files: other.gguf, tiny.gguf" in message
    assert f"Name one of them: {file.parent}/other.gguf" in message
    (file.parent / "config.json").write_text("{}")
    assert resolve_model(str(file.parent)) == str(file.parent)


@pytest.mark.parametrize("name", ["absent.gguf", "./absent.gguf", "models/absent.gguf", "/a/b/absent.gguf"])
def test_no_such_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"{name}: no such file".removeprefix("./") in refusal(name)


def test_a_folder_with_the_name_of_a_file(tmp_path):
    (tmp_path / "x.gguf").mkdir()
    assert "x.gguf has neither config.json nor params.json" in refusal(tmp_path / "x.gguf")


def test_truncated(file):
    size = file.stat().st_size
    os.truncate(file, size - 64)
    message = refusal(file)
    assert f"{file} is truncated: it has {size - 64:,} of {size:,} bytes" in message
    for keep in (3000, 100, 20, 3, 0):
        os.truncate(file, keep)
        message = refusal(file)
        assert f"{file} is not a GGUF file, or is damaged" in message and "Download it again" in message


def test_another_file_of_that_name(file):
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    message = refusal(file)
    assert f"{file} is not a GGUF file" in message and "git lfs pull" in message


def test_damaged_numbers(file):
    """No flipped byte of a header may end in anything but an error of ours, or a model."""
    whole = file.read_bytes()
    for position in range(4, 700, 7):
        file.write_bytes(whole[:position] + b"\xff" + whole[position + 1 :])
        try:
            load_shape(str(file))
        except UserError as error:
            assert error.hint


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(arch="rwkv7"), "architecture rwkv7 is not supported"),
        (dict(general__type="adapter"), "holds no model, but adapter"),
        (dict(split__count=3), "is one of 3 parts of a model"),
        (dict(without=("",)), "a vocabulary without weights"),
    ],
)
def test_files_of_another_kind(tmp_path, model, changes, said):
    file = write_gguf(tmp_path / "tiny.gguf", model, **changes)
    message = refusal(file)
    assert str(file) in message and said in message


def test_weights_that_would_be_made_up_or_left_out(tmp_path, model):
    file = write_gguf(tmp_path / "less.gguf", model, without=("blk.1.ffn_up",))
    with pytest.raises(UserError, match=r"lacks the weights model.layers.1.mlp.up_proj.weight"):
        load_teacher(str(file))
    biases = {"blk.0.attn_q.bias": np.ones(32, np.float32)}
    file = write_gguf(tmp_path / "more.gguf", model, tensors=biases)
    with pytest.raises(UserError, match=r"more.gguf holds 32 weights that transformers does not read"):
        load_teacher(str(file))


def test_sizes_beyond_the_file_are_refused_at_once(tmp_path, model):
    sizes = dict(llama__embedding_length=2**20, llama__vocab_size=2**20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the writer says that a key is set twice
        file = write_gguf(tmp_path / "tiny.gguf", model, **sizes)
    with pytest.raises(UserError, match="tiny.gguf describes"):
        load_teacher(str(file))


def test_no_package(file, monkeypatch):
    monkeypatch.setattr("transformers.utils.is_gguf_available", lambda: False)
    message = refusal(file)
    assert f"{file} needs the package gguf" in message and "pip install 'gguf>=0.10.0'" in message


def test_the_command_writes_nothing(file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.truncate(file, 1000)
    for command in (
        ["convert", str(file), "--no-train"],
        ["convert", str(file), "--dry-run"],
        ["inspect", str(file)],
    ):
        with pytest.raises(SystemExit) as end:
            main(command)
        assert end.value.code == 2 and "tiny.gguf is not a GGUF file" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]
