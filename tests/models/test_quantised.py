"""A quantised checkpoint becomes an ordinary model, or is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import edit_json, save_tokenizer, tiny_model

from linearize_cli.errors import Notice, UserError
from linearize_cli.models.load import load_shape, load_stored, load_teacher

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def write(folder: Path, kind: str, quantised, settings: dict, **sizes) -> dict[str, torch.Tensor]:
    """Write a tiny bfloat16 checkpoint in which `quantised` replaces weights, and return its exact weights.

    Args:
        quantised: returns the stored tensors and the exact weight of a weight, or None to keep it.
        settings: `quantization_config` of config.json.
    """
    tiny_model(kind, hidden_size=32, **sizes).to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(folder)
    edit_json(folder / "config.json", quantization_config=settings)
    stored, exact = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        found = quantised(name, weight) or ({name: weight}, weight)
        stored |= found[0]
        exact[name] = found[1].float()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    return exact


def fp8(name: str, weight: torch.Tensor):
    """Quantise a projection to fp8 with one scale for each block of 16 x 16."""
    if "_proj" not in name:
        return None
    blocks = weight.float().unflatten(1, (-1, 16)).unflatten(0, (-1, 16))
    scale = blocks.abs().amax((1, 3)) / 448
    packed = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    exact = (packed.float() * scale[:, None, :, None]).reshape(weight.shape)
    return {name: packed.reshape(weight.shape), f"{name}_scale_inv": scale}, exact


def mxfp4(name: str, weight: torch.Tensor):
    """Replace the weights of experts by random ones in mxfp4: 32 values of 4 bits and an exponent."""
    if not name.endswith("_proj"):
        return None
    experts, inner, outer = weight.shape
    blocks = torch.randint(0, 256, (experts, outer, inner // 32, 16), dtype=torch.uint8)
    scales = torch.randint(120, 126, (experts, outer, inner // 32), dtype=torch.uint8)
    values = torch.stack([E2M1[(blocks & 15).long()], E2M1[(blocks >> 4).long()]], -1).flatten(-2)
    exact = (values * torch.exp2(scales.float() - 127)[..., None]).flatten(-2).transpose(1, 2)
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}, exact


EXPERTS = dict(num_local_experts=2, num_experts_per_tok=1, head_dim=16, num_key_value_heads=1)
CASES = {
    "fp8": ("llama", fp8, dict(weight_block_size=[16, 16]), dict(intermediate_size=48)),
    "mxfp4": ("gpt_oss", mxfp4, {}, dict(intermediate_size=32, **EXPERTS)),
}


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("method", CASES)
def test_dequantised(tmp_path, method, dtype):
    kind, quantised, settings, sizes = CASES[method]
    exact = write(tmp_path / "model", kind, quantised, {"quant_method": method, **settings}, **sizes)
    with pytest.warns(
        Notice, match=rf"is quantised \({method}\): its weights are dequantised to {dtype or 'bf'}"
    ):
        loaded, _ = load_stored(str(tmp_path / "model"), dtype)
    wanted = torch.float32 if dtype else torch.bfloat16
    assert {parameter.dtype for parameter in loaded.parameters()} == {wanted}
    assert load_shape(str(tmp_path / "model"), dtype).dtype == wanted
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, exact[name].to(wanted)), name
    check_saved(loaded, tmp_path / "saved")


def check_saved(loaded, folder: Path) -> None:
    """Check that a model is saved as if it had never been quantised."""
    assert not loaded.is_quantized and not hasattr(loaded.config, "quantization_config")
    loaded.save_pretrained(folder)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    saved = load_file(folder / "model.safetensors")
    assert saved.keys() == loaded.state_dict().keys()
    assert all(torch.equal(saved[name], weight) for name, weight in loaded.state_dict().items())


def test_bitsandbytes(tmp_path):
    pytest.importorskip("bitsandbytes", reason="it dequantises its own checkpoints")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    original = tiny_model(hidden_size=64, intermediate_size=128).to(torch.bfloat16)
    original.save_pretrained(tmp_path / "original")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "original", quantization_config=settings)
    packed.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    with pytest.warns(Notice, match=r"is quantised \(bitsandbytes\)"):
        loaded, _ = load_teacher(str(tmp_path / "model"), "float32")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    for name, weight in original.state_dict().items():
        assert torch.allclose(loaded.state_dict()[name], weight.float(), atol=0.02), name
    check_saved(loaded, tmp_path / "saved")


@pytest.mark.parametrize("method", ["gptq", "awq", None])
def test_refused(tmp_path, method):
    write(tmp_path, "llama", lambda *_: None, {"quant_method": method, "bits": 4})
    for loads in (load_shape, load_teacher):
        with pytest.raises(UserError, match=rf"is quantised \({method or 'unknown method'}\), and cannot be"):
            loads(str(tmp_path))
