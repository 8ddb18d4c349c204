"""GGUF files as base models: finding the file, checking its header, and what transformers does not read.

transformers reads the config, the tokenizer and the weights. This module adds the checks, because
transformers fills what is missing, and leaves out what it does not know, without an error.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from linearize_cli.errors import UserError, first_five

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

SUFFIX = ".gguf"
DAMAGED = "Download it again. A Git LFS pointer (a few lines of text) wants `git lfs pull`."
OTHER = "Use the model's checkpoint in Hugging Face's format."
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# The frequencies of Llama 3.1 to 3.3, except for the factor, which differs between the models.
LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class Tensor:
    """An entry of a GGUF file's tensor table.

    Attributes:
        type: the name of its ggml type (`F32`, `Q4_K`).
        size: its number of weights.
        start, end: its bytes in the file.
    """

    type: str
    size: int
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """The metadata and the tensor table of a GGUF file."""

    file: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def types(self) -> set[str]:
        """Return the ggml types of the tensors."""
        return {tensor.type for tensor in self.tensors.values()}

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the weights in the file, or float32 if they are quantised."""
        import torch

        # Norms are float32 in a file of half precision.
        named = {"F16": torch.float16, "BF16": torch.bfloat16}
        halves = [named[name] for name in sorted(self.types & named.keys())]
        return torch.float32 if self.quantised or not halves else halves[0]

    @property
    def quantised(self) -> str:
        """Return the quantised types, separated by commas. Return an empty string if there are none."""
        return first_five(self.types - {"F64", "F32", "F16", "BF16"})

    def values(self, name: str) -> np.ndarray:
        """Return the values of a float32 tensor."""
        import numpy as np

        tensor = self.tensors[name]
        return np.fromfile(self.file, "<f4", tensor.size, offset=tensor.start)


def split_name(model: str) -> tuple[str, str]:
    """Return the Hub id and the file of `owner/name:FILE.gguf`. Of any other name, return the name and an
    empty string.
    """
    repo, _, file = model.partition(":") if model.endswith(SUFFIX) else (model, "", "")
    return repo, file


def one_of(model: str | Path, names: list[str], separator: str) -> str:
    """Return the name of the only GGUF file of a folder or a repository.

    Args:
        names: the GGUF files, at least one.
        separator: the character between `model` and the file's name.

    Raises:
        UserError: there are several.
    """
    if len(names) > 1:
        raise UserError(
            f"{model} holds several GGUF files: {first_five(names)}.",
            f"Name one of them: {model}{separator}{min(names)}",
        )
    return names[0]


def download(repo: str, file: str = "", commit: str | None = None) -> str | None:
    """Download a GGUF file of a Hub repository, and return its local path.

    Args:
        file: the file's name. Empty for the only one of the repository.
        commit: the revision.

    Returns:
        the path, or None if the repository has no GGUF file.

    Raises:
        UserError: there is no such file, or there are several and none is named.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.constants import ENDPOINT
    from huggingface_hub.errors import RemoteEntryNotFoundError

    if not file:
        found = snapshot_download(repo, revision=commit, allow_patterns=f"*{SUFFIX}", dry_run=True)
        if not found:
            return None
        file = one_of(repo, [info.filename for info in found], ":")
    try:
        return hf_hub_download(repo, file, revision=commit)
    except RemoteEntryNotFoundError as error:
        raise UserError(f"{repo} has no file {file}.", f"See {ENDPOINT}/{repo}/tree/main") from error


@contextmanager
def opened(source: str) -> Iterator[tuple[str, Header | None]]:
    """Yield the folder of a checkpoint, and the header of its GGUF file, or None if it is another checkpoint.

    A GGUF file is linked into a temporary folder, because transformers would also use a tokenizer or an
    adapter beside it, which may belong to another model.

    Raises:
        UserError: the GGUF file cannot be read (see `read_header`).
    """
    file = Path(source).absolute()
    if not file.is_file():
        yield source, None
        return
    header = read_header(file)
    with TemporaryDirectory(prefix="linearize-") as folder:
        Path(folder, file.name).symlink_to(file)
        yield folder, header


def read_header(file: Path) -> Header:
    """Read and check the header of a GGUF file.

    Raises:
        UserError: the package `gguf` is missing, or the file is damaged, has no weights, or is a part of a
            model.
    """
    from transformers.utils import is_gguf_available

    if not is_gguf_available():
        raise UserError(
            f"{file} needs the package gguf, which is not installed.",
            "Install it: pip install 'gguf>=0.10.0'",
        )
    try:
        header = _parsed(file)
    except (ValueError, KeyError, IndexError, OverflowError, MemoryError, OSError) as error:
        raise UserError(f"{file} is not a GGUF file, or is damaged: {error}", DAMAGED) from error
    kind, parts = header.metadata.get("general.type", "model"), header.metadata.get("split.count", 1)
    if kind != "model":
        raise UserError(f"{file} holds no model, but {kind}.", "Pass the GGUF file of the model.")
    if parts > 1:
        raise UserError(
            f"{file} is one of {parts} parts of a model.",
            "Join them with llama.cpp: llama-gguf-split --merge FIRST.gguf MODEL.gguf",
        )
    if not header.tensors:
        raise UserError(f"{file} holds a vocabulary without weights.", "Pass the GGUF file of the model.")
    end, size = max(tensor.end for tensor in header.tensors.values()), file.stat().st_size
    if end > size:
        raise UserError(f"{file} is truncated: it has {size:,} of {end:,} bytes.", DAMAGED)
    return header


def _parsed(file: Path) -> Header:
    """Return the header of a GGUF file. transformers' reader takes milliseconds, that of gguf seconds."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from transformers.integrations.gguf import reader

    try:
        blob = reader._mapped(str(file))
        metadata, count, position = reader._read_metadata(blob, str(file))
        table, position = reader._read_tensor_table(blob, count, position)
    except struct.error as error:
        raise ValueError("its header ends early") from error
    alignment = metadata.get("general.alignment", 32)
    first, tensors = -(-position // alignment) * alignment, {}
    for name, shape, number, offset in table:
        kind, size = GGMLQuantizationType(number), prod(shape)
        per_block, block_bytes = GGML_QUANT_SIZES[kind]
        start = first + offset
        tensors[name] = Tensor(kind.name, size, start, start + size // per_block * block_bytes)
    return Header(file, metadata, tensors)


def read_config(header: Header, raw: dict[str, Any]) -> PreTrainedConfig:
    """Return the config of a GGUF file, with the dtype of its weights, and with token ids and RoPE scaling
    only if the file has them.

    Args:
        raw: the config that transformers reads from the header.

    Raises:
        UserError: transformers does not read the file's RoPE scaling.
    """
    from transformers import AutoConfig
    from transformers.utils import logging

    raw = {key: value for key, value in raw.items() if key != "_model_name_or_path"}
    config = AutoConfig.for_model(**dict.fromkeys(IDS) | raw)
    config.dtype = header.dtype
    _set_rope(header, config)
    if loader := sys.modules.get("transformers.modeling_gguf_pytorch_utils"):
        loader.tqdm = logging.tqdm  # its own progress bar cannot be switched off
    return config


def _set_rope(header: Header, config: PreTrainedConfig) -> None:
    """Set the RoPE scaling of Llama 3, which a GGUF file stores as one divisor for each frequency.

    Raises:
        UserError: the file has another scaling, which transformers does not read.
    """
    import numpy as np
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    given = header.metadata.get(f"{header.metadata['general.architecture']}.rope.scaling.type", "none")
    if any(name.startswith("rope_factors") for name in header.tensors):
        given = "longrope"
    rope = getattr(config, "rope_parameters", None) or {}
    read = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    if "rope_freqs.weight" in header.tensors and read == {"default"}:
        divisors = header.values("rope_freqs.weight")
        config.rope_parameters = {**rope, **LLAMA3, "factor": 1.0}
        plain, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
        config.rope_parameters = {**rope, **LLAMA3, "factor": float(divisors.max())}
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
        given = "none" if np.allclose((plain / scaled).numpy(), divisors, rtol=1e-3) else "rope_freqs"
    if given != "none" and read <= {"default", None}:
        raise UserError(f"{header.file}: transformers does not read its RoPE scaling ({given}).", OTHER)


def check_all_used(header: Header, loaded: PreTrainedModel) -> None:
    """Check that a model has as many weights as its GGUF file. transformers skips tensors that it does not
    know, such as a bias.

    Raises:
        UserError: the file has more.
    """
    known = {"rope_freqs.weight", *(["output.weight"] if loaded.config.tie_word_embeddings else [])}
    held = sum(tensor.size for name, tensor in header.tensors.items() if name not in known)
    if (left := held - loaded.num_parameters()) > 0:
        raise UserError(
            f"{header.file} holds {left:,} weights that transformers does not read as {type(loaded).__name__}.",
            f"{OTHER} Without these weights it would be another model.",
        )
