"""Writes tiny Llama models as GGUF files, as llama.cpp's converter does."""

from pathlib import Path

import gguf
import numpy as np
import torch
from tiny_checkpoint import tiny_model
from transformers import PreTrainedModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

SPECIAL = ["<unk>", "<s>", "</s>"]
TOKENS = [*SPECIAL, *bytes_to_unicode().values(), "fo", "fox"]
MERGES = ["f o", "fo x"]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tiny_llama(**changes) -> PreTrainedModel:
    """A random Llama with grouped queries, whose rows fill whole blocks of a quantised type."""
    sizes = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
    return tiny_model(vocab_size=len(TOKENS), **{**sizes, "max_position_embeddings": 256, **changes}).eval()


def write_gguf(
    file: Path,
    model: PreTrainedModel,
    kind: str = "F32",
    arch: str = "llama",
    tensors: dict[str, np.ndarray] | None = None,
    without: tuple[str, ...] = (),
    ids: bool = True,
    **keys,
) -> Path:
    """Write a Llama and its tokenizer.

    Args:
        kind: the ggml type of the matrices. Vectors are float32.
        tensors: further tensors, in float32.
        without: parts of the names of tensors to leave out.
        ids: False to leave out the ids of special tokens.
        keys: further metadata, with `__` for a dot.
    """
    config, writer = model.config, gguf.GGUFWriter(file, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_chat_template(TEMPLATE)
    if ids:
        writer.add_unk_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
    for key, value in keys.items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key.replace("__", "."), value)
    for name, values in stored(model).items():
        if not any(part in name for part in without):
            add(writer, name, values, kind if values.ndim == 2 else "F32")
    for name, values in (tensors or {}).items():
        add(writer, name, values, "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def add(writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: str) -> None:
    number = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(name, gguf.quants.quantize(values, number), raw_dtype=number)


def stored(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """Return a Llama's weights by llama.cpp's names. Its rotary halves are interleaved there."""
    found = {}
    for name, values in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
        if count := next((count for part, count in heads.items() if part in name), None):
            values = values.unflatten(0, (count, 2, -1)).transpose(1, 2).reshape(values.shape)
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        found[name] = values.float().numpy()
    return found


def rounded(model: PreTrainedModel, kind: str) -> PreTrainedModel:
    """Round the matrices of a model to the values that a ggml type can hold."""
    number = gguf.GGMLQuantizationType[kind]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                packed = gguf.quants.quantize(parameter.numpy(), number)
                parameter.copy_(torch.from_numpy(gguf.quants.dequantize(packed, number)))
    return model
