"""SHA-256 sums of the files that an artifact is loaded from. A copy of this module is inside every artifact."""

import hashlib
import json
from fnmatch import fnmatchcase
from pathlib import Path

CHUNK = 1 << 22  # bytes read at a time
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
CODE = ("configuration_linearized.py", "modeling_linearized.py", "linearize_*.py")
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "additional_chat_templates/*.jinja"),
    *("tokenizer.model", "spiece.model", "spm*.model", "sentencepiece*.model", "source.spm", "target.spm"),
    *(
        "vocab.json",
        "vocab-src.json",
        "vocab-tgt.json",
        "target_vocab.json",
        "entity_vocab.json",
        "vocab.txt",
    ),
    *("merges.txt", "dict.txt", "bpe.codes", "prophetnet.tokenizer"),
    *("byte_maps.json", "emoji.json", "normalizer.json", "word_pronunciation.json", "word_shape.json"),
)
# Files of sentence-transformers, beside the model and in the folders of its other modules.
SENTENCES = (
    *("modules.json", "sentence_*_config.json", "config_sentence_transformers.json"),
    *("[1-9]_*/config.json", "[1-9]_*/model.safetensors", "[1-9]_*/pytorch_model.bin"),
)
ADAPTER = ("adapter/adapter_model.safetensors", "adapter/adapter_config.json")
# Files that loading an artifact reads; the checksums cover these.
LOADED = (
    *(*WEIGHTS, *CODE, *TOKENIZER, *SENTENCES, *ADAPTER),
    *("config.json", "generation_config.json", "recipe.yaml", "medusa.safetensors"),
    *("adapter_config.json", "adapter_model.safetensors"),  # transformers would add such an adapter unasked
)


def matches(parts: tuple[str, ...], pattern: list[str]) -> bool:
    """Return True if the parts of a path match the parts of a pattern. `*` does not match `/`."""
    return len(parts) == len(pattern) and all(map(fnmatchcase, parts, pattern))


def is_loaded(path: Path) -> bool:
    """Return True if loading an artifact reads this file.

    Args:
        path: relative to the artifact's folder.
    """
    return any(matches(path.parts, pattern.split("/")) for pattern in LOADED)


def sha256(path: Path) -> str:
    """Return the SHA-256 sum of a file as a hexadecimal string."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 sums of all files that loading an artifact may read, by relative path."""
    files = sorted(
        path for path in folder.rglob("*") if path.is_file() and is_loaded(path.relative_to(folder))
    )
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}


def differing(recorded: dict[str, str], folder: Path, besides: str = "") -> dict[str, set[str]]:
    """Return the files of an artifact that differ from their sums, under `changed`, `missing` and `new`.

    Args:
        recorded: the sums by relative path.
        besides: the relative path of a file to leave out. Empty: compare all.
    """
    now = checksums(folder)
    recorded, now = ({k: v for k, v in sums.items() if k != besides} for sums in (recorded, now))
    return {
        "changed": {name for name in recorded.keys() & now.keys() if recorded[name] != now[name]},
        "missing": recorded.keys() - now.keys(),
        "new": now.keys() - recorded.keys(),
    }


def check_folder(folder: Path) -> None:
    """Compare an artifact's files with the sums in `linearize.json`. Do nothing without that file, or without sums.

    Raises:
        ValueError: a file was changed, is missing or is new.
    """
    try:
        recorded = json.loads((folder / "linearize.json").read_text(encoding="utf-8"))["checksums"]
    except (OSError, ValueError, LookupError, TypeError):
        return  # a folder that `save_pretrained` wrote has no such file
    kinds = differing(recorded, folder).items() if isinstance(recorded, dict) else ()
    if found := "; ".join(f"{kind}: {', '.join(sorted(names)[:5])}" for kind, names in kinds if names):
        raise ValueError(
            f"{folder}: its files are not those that were saved: {found}. Download it again, or pass "
            "checksums=False if you changed it yourself."
        )
