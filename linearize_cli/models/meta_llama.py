"""Meta's original Llama format: `params.json`, `consolidated.NN.pth` shards and `tokenizer.model`.

The shards are the slices of a tensor-parallel model, one per GPU. They are joined and renamed in memory into
a transformers `LlamaForCausalLM`. Nothing is written to disk. The layout is that of
https://github.com/meta-llama/llama and https://github.com/meta-llama/llama-models. The files of Llama 1 and
of Llama 2 look the same. Both get a context of 4096 tokens, although Llama 1 was trained with 2048
(`max_seq_len` in `params.json` overrides it).
"""

import base64
import pickle
import re
from itertools import count
from pathlib import Path

import torch
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from linearize_cli.errors import UserError, first_five
from linearize_cli.inputs import read_object

Shards = dict[Path, dict[str, torch.Tensor]]

REQUIRED = {"dim", "n_layers", "n_heads", "norm_eps"}
OPTIONAL = {"n_kv_heads", "vocab_size", "rope_theta", "use_scaled_rope", "rope_scaling_factor", "max_seq_len"}
NUMBERS = REQUIRED | OPTIONAL - {"use_scaled_rope"}
UNUSED = {"multiple_of", "ffn_dim_multiplier", "max_batch_size"}  # the MLP's width comes from its tensors

CONTEXT_BY_ROPE_THETA = {500_000: 8192, 1_000_000: 16384}  # Llama 3, Code Llama
SCALED_ROPE_CONTEXT = 131072

# Meta's name: (transformers' name, the axis along which it is sharded, or None if it is replicated)
LAYER_TENSORS = {
    "attention.wq": ("self_attn.q_proj", 0),
    "attention.wk": ("self_attn.k_proj", 0),
    "attention.wv": ("self_attn.v_proj", 0),
    "attention.wo": ("self_attn.o_proj", 1),
    "feed_forward.w1": ("mlp.gate_proj", 0),
    "feed_forward.w2": ("mlp.down_proj", 1),
    "feed_forward.w3": ("mlp.up_proj", 0),
    "attention_norm": ("input_layernorm", None),
    "ffn_norm": ("post_attention_layernorm", None),
}

DOWNLOAD_AGAIN = "Download the checkpoint again: the file is truncated or is not one of Meta's Llama files."


def is_meta_folder(path: str | Path) -> bool:
    """Return True if a folder is in Meta's format. With a `config.json` it is in Hugging Face's format."""
    return Path(path, "params.json").is_file() and not Path(path, "config.json").is_file()


def load_meta_llama(path: str | Path, dtype: torch.dtype | None = None) -> LlamaForCausalLM:
    """Load the model in a folder of Meta's format on the CPU, in eval mode.

    Args:
        path: a folder with `params.json` and `consolidated.NN.pth`.
        dtype: the dtype of the weights. None keeps the checkpoint's.

    Raises:
        UserError: a file is missing, unreadable or does not match `params.json`. Pickled code never runs.
    """
    folder = Path(path)
    params = _read_params(folder / "params.json")
    shards = {file: _read_shard(file) for file in _shard_files(folder)}
    config = _config(params, shards)
    weights = _join(config, shards)
    dtype = dtype or weights["model.embed_tokens.weight"].dtype
    return LlamaForCausalLM.from_pretrained(None, config=config, state_dict=weights, dtype=dtype).eval()


def meta_llama_config(path: str | Path) -> LlamaConfig:
    """Return the config of the model in a folder of Meta's format, with its dtype.

    Raises:
        UserError: a file is missing, unreadable or does not match `params.json`.
    """
    folder = Path(path)
    shards = {file: _read_shard(file) for file in _shard_files(folder)}
    config = _config(_read_params(folder / "params.json"), shards)
    config.dtype = next(iter(shards.values()))["tok_embeddings.weight"].dtype
    return config


def _read_params(file: Path) -> dict:
    """Return the contents of `params.json`, after a check that all keys are known and the required ones are
    there.
    """
    params = read_object(file, DOWNLOAD_AGAIN)
    if missing := REQUIRED - params.keys():
        raise UserError(f"{file} lacks {first_five(missing)}.", DOWNLOAD_AGAIN)
    odd = {key for key in NUMBERS if not isinstance(params.get(key, 1), int | float | None)}
    if odd:
        raise UserError(f"{file}: {first_five(odd)} must be a number.", DOWNLOAD_AGAIN)
    unknown = {key for key, value in params.items() if value is not None} - REQUIRED - OPTIONAL - UNUSED
    if unknown:
        raise UserError(
            f"{file} has {first_five(unknown)}, which Llama 1 to 3 do not have: it would load wrongly.",
            "Use the model's Hugging Face checkpoint (with `config.json`) instead.",
        )
    return params


def _shard_files(folder: Path) -> list[Path]:
    """Return the paths of the shard files in order.

    Raises:
        UserError: a shard is missing.
    """
    files = sorted(folder.glob("consolidated.*.pth"))
    for i in range(max(len(files), 1)):
        expected = folder / f"consolidated.{i:02d}.pth"
        if expected not in files:
            found = first_five(file.name for file in files) or "no shard"
            raise UserError(
                f"{expected} is missing: the folder holds {found}.",
                "Download the missing shard into the folder. Shards are numbered from 00.",
            )
    return files


def _read_shard(file: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a shard by name."""
    try:
        shard = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{file} contains Python code in addition to tensors. It was not run.",
            "Take the checkpoint from a source you trust, or use one with safetensors files.",
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{file} cannot be read: {reason}", DOWNLOAD_AGAIN) from error
    if not isinstance(shard, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in shard.values()):
        raise UserError(f"{file} is not a mapping of names to tensors.", DOWNLOAD_AGAIN)
    shard.pop("rope.freqs", None)  # follows from rope_theta
    return shard


def _config(params: dict, shards: Shards) -> LlamaConfig:
    """Return the model's config, from `params.json` and from the shapes of the first shard's tensors."""
    (file, first), dim = next(iter(shards.items())), params["dim"]
    names = ("layers.0.attention.wq.weight", "layers.0.feed_forward.w1.weight", "tok_embeddings.weight")
    if missing := [name for name in names if name not in first or first[name].dim() != 2]:
        raise UserError(f"{file} lacks {first_five(missing)}: it is not a shard of a Llama.", DOWNLOAD_AGAIN)
    query, gate, embedding = (first[name].shape for name in names)
    needed = dim // query[0]
    if dim % query[0] == 0 and needed != len(shards):
        raise UserError(
            f"{file} holds 1/{needed} of each layer: {needed} shard(s) belong together, not {len(shards)}.",
            "Put all the shards of one model, and no others, into the folder.",
        )
    vocab = embedding[0] * (len(shards) if _embedding_axis(embedding, dim) == 0 else 1)
    if (params.get("vocab_size") or -1) not in (-1, vocab):
        raise UserError(
            f"{file.parent / 'params.json'}: vocab_size is {params['vocab_size']}, but {vocab} in {file.name}.",
            DOWNLOAD_AGAIN,
        )
    layers = {int(name.split(".")[1]) for name in first if re.match(r"layers\.\d+\.", name)}
    if params["n_layers"] != len(layers):
        raise UserError(
            f"{file.parent / 'params.json'}: n_layers is {params['n_layers']!r}, but {file.name} has {len(layers)}.",
            "params.json and the shards must belong to one model.",
        )
    theta = params.get("rope_theta") or 10_000
    context = CONTEXT_BY_ROPE_THETA.get(theta, 4096)
    rope = {"rope_type": "default", "rope_theta": float(theta)}
    if params.get("use_scaled_rope"):
        context = SCALED_ROPE_CONTEXT
        # params.json lacks the factor. It is 32 for Llama 3.2 1B and 3B, the only ones narrower than 4096,
        # and 8 otherwise (https://github.com/meta-llama/llama-models/issues/241).
        factor = params.get("rope_scaling_factor") or (8 if dim >= 4096 else 32)
        rope |= {"rope_type": "llama3", "factor": float(factor), "original_max_position_embeddings": 8192}
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=dim,
        intermediate_size=gate[0] * len(shards),
        num_hidden_layers=params["n_layers"],
        num_attention_heads=params["n_heads"],
        num_key_value_heads=params.get("n_kv_heads") or params["n_heads"],
        rms_norm_eps=params["norm_eps"],
        rope_parameters=rope,
        max_position_embeddings=params.get("max_seq_len") or context,
        tie_word_embeddings=not any("output.weight" in shard for shard in shards.values()),
    )


def _embedding_axis(shape: torch.Size, dim: int) -> int:
    """Return the axis along which the embedding [vocabulary, dim] is sharded.

    Llama 1 and 2 shard it along its width, Llama 3 along the vocabulary.
    """
    return 0 if shape[1] == dim else 1


def _join(config: LlamaConfig, shards: Shards) -> dict[str, torch.Tensor]:
    """Check the names and shapes of all shards, and join them into tensors under transformers' names."""
    first = next(iter(shards.values()))
    embedding_axis = _embedding_axis(first["tok_embeddings.weight"].shape, config.hidden_size)
    names = {  # Meta's name: (transformers' name, shard axis)
        "tok_embeddings.weight": ("model.embed_tokens.weight", embedding_axis),
        "norm.weight": ("model.norm.weight", None),
    }
    for i in range(config.num_hidden_layers):
        for meta, (hf, axis) in LAYER_TENSORS.items():
            names[f"layers.{i}.{meta}.weight"] = (f"model.layers.{i}.{hf}.weight", axis)
    if not config.tie_word_embeddings:
        names["output.weight"] = ("lm_head.weight", 0)

    _check_shards(config, shards, names)
    weights = {}
    for meta, (hf, axis) in names.items():
        parts = [shard[meta] for shard in shards.values()]
        whole = parts[0] if axis is None or len(parts) == 1 else torch.cat(parts, axis)
        if meta.endswith("attention.wq.weight"):
            whole = _half_split(whole, config.num_attention_heads)
        elif meta.endswith("attention.wk.weight"):
            whole = _half_split(whole, config.num_key_value_heads)
        weights[hf] = whole
    return weights


def _check_shards(config: LlamaConfig, shards: Shards, names: dict) -> None:
    """Check that each shard has the names and shapes that the config requires."""
    with torch.device("meta"):
        whole = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    for file, shard in shards.items():
        if missing := names.keys() - shard.keys():
            raise UserError(
                f"{file} lacks {first_five(missing)}, which params.json requires.", DOWNLOAD_AGAIN
            )
        if unexpected := shard.keys() - names.keys():
            raise UserError(
                f"{file} has {first_five(unexpected)}, which params.json does not call for.", DOWNLOAD_AGAIN
            )
        for meta, (hf, axis) in names.items():
            expected = [size // len(shards) if i == axis else size for i, size in enumerate(whole[hf])]
            if list(shard[meta].shape) != expected:
                raise UserError(
                    f"{file}: {meta} is {list(shard[meta].shape)}, but params.json calls for {expected}.",
                    DOWNLOAD_AGAIN,
                )


def _half_split(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of each head for RoPE.

    Meta rotates rows 2i and 2i + 1 of a head together, transformers rows i and i + d/2.

    Args:
        weight: `[heads * d, dim]`.
    """
    rows, dim = weight.shape
    return weight.view(heads, rows // heads // 2, 2, dim).transpose(1, 2).reshape(rows, dim)


def load_meta_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a folder. It puts BOS before each text, as Llama expects.

    `tokenizer.model` is a SentencePiece model (Llama 1 and 2) or tiktoken's BPE ranks (Llama 3).

    Raises:
        UserError: `tokenizer.model` is missing or is neither of the two.
    """
    file = Path(path) / "tokenizer.model"
    if not file.is_file():
        raise UserError(f"{file} is missing.", "Download Meta's tokenizer.model into the folder.")
    with file.open("rb") as lines:
        is_tiktoken = re.fullmatch(rb"[\w+/=]+ \d+\s*", lines.readline(200))
    return _tiktoken(file) if is_tiktoken else _sentencepiece(file)


def _sentencepiece(file: Path) -> PreTrainedTokenizerFast:
    """Load a SentencePiece model as a fast tokenizer, and check that both give the same tokens."""
    reference = SentencePieceProcessor()
    try:
        reference.Load(str(file))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{file} is neither SentencePiece nor tiktoken's BPE.", DOWNLOAD_AGAIN) from error
    bos, eos, unk = reference.bos_id(), reference.eos_id(), reference.unk_id()
    if min(bos, eos, unk) < 0:
        raise UserError(f"{file} lacks a BOS, EOS or unknown token.", DOWNLOAD_AGAIN)
    backend = LlamaTokenizer.from_pretrained(file.parent).backend_tokenizer
    # LlamaTokenizer adds no "▁" to a text that starts with a space; SentencePiece does.
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = _with_bos(backend, *(reference.id_to_piece(i) for i in (bos, eos, unk)))
    probe = " Two  spaces,\n12 ☃ naïve"
    if tokenizer.encode(probe) != [bos, *reference.encode(probe)]:
        raise UserError(f"{file} has SentencePiece settings other than Llama's.", DOWNLOAD_AGAIN)
    return tokenizer


class _Llama3Converter(TikTokenConverter):
    """A converter that reads the ranks itself, because transformers would need the `tiktoken` package."""

    @staticmethod
    def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
        lines = (line.split() for line in Path(tiktoken_url).read_bytes().splitlines() if line)
        return {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}


def _tiktoken(file: Path) -> PreTrainedTokenizerFast:
    """Load tiktoken's BPE ranks as a fast tokenizer with Llama 3's special tokens."""
    # The 256 tokens after the ranks, by Llama 3.1's names; in Llama 3.0 some of them are still reserved.
    named = {0: "<|begin_of_text|>", 1: "<|end_of_text|>", 4: "<|finetune_right_pad_id|>"}
    named |= {6: "<|start_header_id|>", 7: "<|end_header_id|>", 8: "<|eom_id|>", 9: "<|eot_id|>"}
    named |= {10: "<|python_tag|>"}
    reserved = count()
    special = [named.get(i) or f"<|reserved_special_token_{next(reserved)}|>" for i in range(256)]
    try:
        backend = _Llama3Converter(str(file)).converted()
    except ValueError as error:
        raise UserError(f"{file} is not tiktoken's BPE: {error}", DOWNLOAD_AGAIN) from error
    backend.add_special_tokens(special)
    return _with_bos(backend, special[0], special[1])


def _with_bos(backend: Tokenizer, bos: str, eos: str, unk: str | None = None) -> PreTrainedTokenizerFast:
    """Return a fast tokenizer that puts BOS before each text."""
    backend.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, unk_token=unk)
