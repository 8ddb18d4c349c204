"""Writes a Llama in Meta's original format, the inverse of what linearize_cli.models.meta_llama reads."""

import base64
import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

PARAMS = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5, "vocab_size": -1}

TO_META = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "model.layers": "layers",
}


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Meta's order of a head's rows: row 2i of Meta is row i here, row 2i + 1 is row i + d/2."""
    out = torch.empty_like(weight)
    size = weight.shape[0] // heads
    for head in range(heads):
        for i in range(size // 2):
            out[head * size + 2 * i] = weight[head * size + i]
            out[head * size + 2 * i + 1] = weight[head * size + size // 2 + i]
    return out


def meta_shards(weights: dict, config: LlamaConfig, shards: int, embedding_axis: int) -> list[dict]:
    """The weights of a Hugging Face Llama as `shards` tensor-parallel slices under Meta's names."""
    out = [{"rope.freqs": torch.ones(config.head_dim // 2)} for _ in range(shards)]
    for name, tensor in weights.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if "q_proj" in name:
            tensor = interleaved(tensor, config.num_attention_heads)
        if "k_proj" in name:
            tensor = interleaved(tensor, config.num_key_value_heads)
        for ours, meta in TO_META.items():
            name = name.replace(ours, meta)
        if tensor.dim() == 1:
            parts = [tensor] * shards
        elif "tok_embeddings" in name:
            parts = tensor.chunk(shards, embedding_axis)
        else:
            parts = tensor.chunk(shards, 1 if name.endswith(("wo.weight", "w2.weight")) else 0)
        for shard, part in zip(out, parts, strict=True):
            shard[name] = part.clone()
    return out


def write_meta(folder: Path, shards: list[dict], params: dict = PARAMS) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    for i, shard in enumerate(shards):
        torch.save(shard, folder / f"consolidated.{i:02d}.pth")
    return folder


def tiny_llama(**kwargs) -> LlamaForCausalLM:
    """A random model with grouped-query attention that PARAMS describes."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes | heads | {"rms_norm_eps": 1e-5} | kwargs)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():  # the default 0.02 would leave attention nearly uniform and hide a wrong RoPE order
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    return model


def write_byte_tokenizer(folder: Path) -> None:
    """A `tokenizer.model` as of Llama 3 (tiktoken) that knows the 256 bytes alone; BOS is 256, EOS 257."""
    lines = [f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256)]
    (folder / "tokenizer.model").write_text("".join(lines))
