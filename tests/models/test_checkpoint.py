"""Every local checkpoint that a user can name loads, or is refused with the file and what to do."""

import json
import logging
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_checkpoint import Malicious, edit_json, save_tokenizer, tiny_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import linearize_cli.demo
from linearize_cli.errors import Notice, UserError
from linearize_cli.models.find import resolve_model
from linearize_cli.models.load import load_shape, load_stored, load_teacher

STORIES = Path(__file__).parents[3] / "shared/checkpoints/stories260k-llama"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A whole Hugging Face checkpoint."""
    folder = tmp_path / "tiny"
    tiny_model().save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def refusal(model: Path | str, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        load_teacher(str(model), **kwargs)
    assert caught.value.hint, "says what to do next"
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_folder(folder):
    model, tokenizer = load_teacher(str(folder))
    expected = LlamaForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([tokenizer.encode("a fox sat")])
    assert ids.tolist() == [[3, 4, 5]]
    assert torch.equal(model(ids).logits, expected(ids).logits)
    assert not model.training
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"{STORIES.name} is not at hand")
def test_pretrained_model():
    model, tokenizer = load_teacher(str(STORIES))
    ids = torch.tensor([tokenizer.encode("Once upon a time, there was a little girl named Lily.")])
    assert model(ids, labels=ids).loss < 2


def test_dtype(folder):
    assert load_teacher(str(folder))[0].dtype == torch.float32
    assert load_teacher(str(folder), dtype="bfloat16")[0].dtype == torch.bfloat16
    LlamaForCausalLM.from_pretrained(folder, dtype=torch.float16).save_pretrained(folder)
    assert load_stored(str(folder))[0].dtype == torch.float16


@pytest.mark.parametrize("arguments", [{"dtype": "bf17"}, {"dtype": "nn"}, {"device": "gpu"}])
def test_bad_dtype_or_device(folder, arguments):
    assert f"`{next(iter(arguments.values()))}`" in refusal(folder, **arguments)


def test_attention_implementation_is_ours_to_choose(folder):
    """config.json may ask for flash attention, or for a kernel to download and run."""
    edit_json(folder / "config.json", attn_implementation="flash_attention_2")
    assert load_teacher(str(folder))[0].config._attn_implementation == "sdpa"
    tiny_model("bloom", n_head=2).save_pretrained(folder)
    assert load_teacher(str(folder))[0].config._attn_implementation == "eager"


def test_demo(folder, monkeypatch):
    monkeypatch.setattr(linearize_cli.demo, "teacher_path", lambda: folder)
    assert resolve_model("demo") == str(folder)
    assert type(load_teacher("demo")[0]).__name__ == "LlamaForCausalLM"


def test_local_folder_wins_over_hub_id(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    folder.rename("owner/name")
    assert resolve_model("owner/name") == "owner/name"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/owner/name") == str(tmp_path / "owner/name")


@pytest.mark.parametrize("path", ["./absent", "../absent/x", "/absent", "~/absent", "a/b/c", "."])
def test_no_such_folder(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refusal(path)
    assert ("no such folder" if path != "." else "neither config.json nor params.json") in message


@pytest.mark.parametrize("name", ["not an id", "owner/", "-x"])
def test_neither_folder_nor_hub_id(name):
    assert f"{name} is neither a folder nor a Hub id" in refusal(name)


def test_a_file_is_not_a_model(folder):
    message = refusal(folder / "model.safetensors")
    assert "model.safetensors is a file" in message and "folder" in message


def test_no_config(folder):
    (folder / "config.json").unlink()
    assert f"{folder} has neither config.json nor params.json" in refusal(folder)


@pytest.mark.parametrize("text", ["", "{not json", "[]"])
def test_config_that_is_not_json(folder, text):
    (folder / "config.json").write_text(text)
    message = refusal(folder)
    assert str(folder) in message and "config.json" in message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "brand_new"}, "pip install --upgrade transformers"),
        ({"model_type": None}, "has no model_type"),
        ({"model_type": "clip"}, "not a causal LM"),
        ({"num_attention_heads": 3}, "not a multiple of the number of attention heads"),
    ],
)
def test_unusable_config(folder, changes, said):
    edit_json(folder / "config.json", **changes)
    message = refusal(folder)
    assert str(folder) in message and "config.json" in message and said in message


def test_missing_weights_are_not_made_up(folder):
    edit_json(folder / "config.json", num_hidden_layers=3)
    message = refusal(folder)
    assert "lacks the weights model.layers.2.input_layernorm.weight" in message and "and 4 more" in message


def test_weights_of_another_shape_are_not_made_up(folder):
    edit_json(folder / "config.json", intermediate_size=26)
    message = refusal(folder)
    assert (
        "model.layers.0.mlp.down_proj.weight is [16, 24], not [16, 26]" in message and str(folder) in message
    )


def add_weights(folder: Path, *names: str) -> None:
    file = folder / "model.safetensors"
    save_file(load_file(file) | {name: torch.ones(16) for name in names}, file, {"format": "pt"})


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.self_attn.q_proj.weight",  # a layer more
        "model.layers.2.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.bias",  # a bias that the config switches off
        "model.layers.1.mlp.down_proj.bias",
        "lm_head.bias",
    ],
)
def test_a_layer_or_bias_is_never_left_out(folder, name):
    add_weights(folder, name)
    message = refusal(folder)
    assert name in message and str(folder) in message and "config.json" in message


def test_a_layer_too_few(folder):
    edit_json(folder / "config.json", num_hidden_layers=1)
    assert "model.layers.1.input_layernorm.weight" in refusal(folder)


def test_other_weights_are_left_out_with_a_notice(folder):
    add_weights(folder, "v_head.summary.weight", "vision_tower.layers.0.q_proj.weight")
    with pytest.warns(Notice, match="are ignored: v_head.summary.weight, vision_tower"):
        load_teacher(str(folder))


def test_layers_that_only_draft_are_left_out_with_a_notice(folder):
    edit_json(folder / "config.json", num_nextn_predict_layers=1)
    add_weights(folder, "model.layers.2.eh_proj.weight", "model.layers.2.input_layernorm.weight")
    with pytest.warns(Notice, match="are ignored: model.layers.2.eh_proj.weight"):
        load_teacher(str(folder))
    add_weights(folder, "model.layers.3.input_layernorm.weight")
    assert "does not describe: model.layers.3.input_layernorm.weight" in refusal(folder)


def test_weights_that_every_checkpoint_may_hold_are_no_notice(folder, recwarn):
    add_weights(folder, "model.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.inv_freq")
    load_teacher(str(folder))
    assert not [warning for warning in recwarn if issubclass(warning.category, Notice)]


def test_a_trainer_s_other_files_are_not_blamed(folder):
    torch.save(Malicious(folder / "marker"), folder / "training_args.bin")
    (folder / "optimizer.bin").write_bytes(b"")
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    message = refusal(folder)
    assert "no weights" in message and "weights.safetensors" in message and "training_args" not in message
    (folder / "weights.safetensors").rename(folder / "model.safetensors")
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    message = refusal(folder)
    assert "training_args" not in message and "optimizer.bin" not in message and "Download" not in message


def test_a_decoder_without_a_head_is_called_so(tmp_path):
    tiny_model("llama").base_model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    message = refusal(tmp_path)
    assert "is a LlamaModel without the head" in message and "Download" not in message


def test_an_encoder_without_a_head_needs_no_pooler(tmp_path):
    tiny_model("bert", is_decoder=False).base_model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.warns(Notice, match="it has no pooler"):
        model, _ = load_teacher(str(tmp_path))
    assert type(model).__name__ == "BertModel"


def test_an_index_stays_in_its_folder(folder, shards, tmp_path):
    shards[0].rename(tmp_path / "outside.safetensors")
    index = folder / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "", None, [], 3):
        weight_map = {
            key: name if value == shards[0].name else value for key, value in whole["weight_map"].items()
        }
        index.write_text(json.dumps(whole | {"weight_map": weight_map}))
        assert "not the name of a file in its folder" in refusal(folder)
    for weight_map in ([], None, "x"):
        index.write_text(json.dumps(whole | {"weight_map": weight_map}))
        assert str(index) in refusal(folder)


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("llama", "num_hidden_layers"),
        ("gpt2", "n_layer"),
        ("mixtral", "num_local_experts"),
        ("bart", "encoder_layers"),
    ],
)
def test_a_million_layers_are_refused_at_once(tmp_path, kind, key):
    tiny_model(kind).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    edit_json(tmp_path / "config.json", **{key: 10**6})
    started = time.monotonic()
    assert key in refusal(tmp_path) and time.monotonic() - started < 1
    with pytest.raises(UserError, match=key):
        load_shape(str(tmp_path))


def test_sizes_beyond_the_weight_files_are_refused_at_once(folder):
    edit_json(folder / "config.json", hidden_size=2**20, vocab_size=2**20, num_attention_heads=2**13)
    assert "config.json describes" in refusal(folder)


def test_a_config_that_is_not_utf_8(folder):
    text = (folder / "config.json").read_bytes()
    (folder / "config.json").write_bytes(text.replace(b"llama", b"ll\xffama"))
    assert "config.json" in refusal(folder)


def test_load_report_of_transformers_is_not_shown(folder):
    records, handler = [], logging.Handler()
    handler.emit = records.append
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_warning()  # a command that ran before may have silenced all
    edit_json(folder / "config.json", num_hidden_layers=3)
    logging.getLogger("transformers").addHandler(handler)
    try:
        refusal(folder)
        assert not records
        AutoModelForCausalLM.from_pretrained(folder)
        assert records, "there is no report to silence: the test proves nothing"
    finally:
        logging.getLogger("transformers").removeHandler(handler)
        transformers.utils.logging.set_verbosity(before)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    message = refusal(folder)
    assert str(folder) in message and "model.safetensors" in message and "Download" in message


@pytest.mark.parametrize("keep", [0, 3, 100, 4000])
def test_truncated_safetensors(folder, keep):
    os.truncate(folder / "model.safetensors", keep)
    message = refusal(folder)
    assert f"{folder / 'model.safetensors'} cannot be read" in message and "Download it again" in message


@pytest.fixture
def shards(folder) -> list[Path]:
    (folder / "model.safetensors").unlink()
    tiny_model().save_pretrained(folder, max_shard_size="4KB")
    files = sorted(folder.glob("model-*.safetensors"))
    assert len(files) > 2
    return files


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"])
def test_broken_shard_is_named(folder, shards, content):
    load_teacher(str(folder))
    shards[1].write_bytes(content)
    message = refusal(folder)
    assert f"{shards[1]} cannot be read" in message and "git lfs pull" in message


def test_missing_shard_is_named(folder, shards):
    shards[1].unlink()
    assert str(shards[1]) in refusal(folder)


@pytest.mark.parametrize("trust_remote_code", [False, True])
@pytest.mark.parametrize(
    "save", [torch.save, lambda content, file: file.write_bytes(pickle.dumps(content, 2))]
)
def test_pickled_code_does_not_run(folder, tmp_path, save, trust_remote_code):
    (folder / "model.safetensors").unlink()
    marker, file = tmp_path / "marker", folder / "pytorch_model.bin"
    save(tiny_model().state_dict() | {"evil": Malicious(marker)}, file)
    message = refusal(folder, trust_remote_code=trust_remote_code)
    assert not marker.exists()
    assert str(file) in message and "was not run" in message
    pickle.loads(pickle.dumps(Malicious(marker)))
    assert marker.exists(), "the pickle is harmless: the test proves nothing"


def test_pickled_tensors_load(folder):
    expected = load_teacher(str(folder))[0]
    torch.save(expected.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    loaded = load_teacher(str(folder))[0]
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), expected.parameters(), strict=True))
    os.truncate(folder / "pytorch_model.bin", 5000)
    assert f"{folder / 'pytorch_model.bin'} cannot be read" in refusal(folder)


OWN_MODEL = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({marker!r}).write_text("ran")
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(folder, tmp_path, monkeypatch) -> Iterator[Path]:
    """The marker file that the checkpoint's own.py would write."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", sys.path.copy())  # transformers adds the folder above to it
    (folder / "own.py").write_text(OWN_MODEL.format(marker=str(tmp_path / "marker")))
    yield tmp_path / "marker"
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]  # the package of the folder above: others would look for their code there


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("config.json", {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}),
        ("config.json", {"model_type": "vit", "auto_map": {"AutoModelForCausalLM": "own.OwnModel"}}),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}},
        ),
    ],
)
def test_own_code_is_refused(folder, own_code, monkeypatch, file, changes):
    asked = []
    monkeypatch.setattr("builtins.input", lambda prompt: asked.append(prompt) or "n")
    edit_json(folder / file, **changes)
    message = refusal(folder)
    assert str(folder) in message and "--trust-remote-code" in message
    assert not own_code.exists() and not asked


def test_own_code_runs_with_trust(folder, own_code):
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    edit_json(folder / "config.json", model_type="own", auto_map=classes)
    assert type(load_teacher(str(folder), trust_remote_code=True)[0]).__name__ == "OwnModel"
    assert own_code.exists()
    (folder / "own.py").write_text("import no_such_package")
    message = refusal(folder, trust_remote_code=True)
    assert "no_such_package" in message and "Install" in message


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "opt"])
def test_no_tokenizer_files(tmp_path, kind):
    """For some models transformers makes an empty tokenizer instead of an error."""
    tiny_model(kind).save_pretrained(tmp_path)
    message = refusal(tmp_path)
    assert str(tmp_path) in message and "tokenizer.json" in message


@pytest.mark.parametrize("text", ["", "{not json", '{"version": "1.0"}'])
def test_broken_tokenizer(folder, text):
    (folder / "tokenizer.json").write_text(text)
    message = refusal(folder)
    assert str(folder) in message and "tokenizer" in message


def test_adapter_beside_the_model(folder):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(load_teacher(str(folder))[0], config).save_pretrained(folder)
    assert "LoRA" in refusal(folder) and "merge_and_unload" in refusal(folder)


def test_import_is_light():
    """`linearize --help` must not wait for torch."""
    program = "import sys, linearize_cli.models.load; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
