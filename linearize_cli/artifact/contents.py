"""The files that belong to an artifact."""

import json
import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from linearize_cli.files import SUFFIX

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
HEADS = ("medusa.safetensors", "medusa.jsonl")
ADAPTER = ("adapter/adapter_model.safetensors", "adapter/adapter_config.json")
REPORTS = ("verify.json", "eval.json", "eval-*.png", "bench.json", "bench.png", "report.html")
# Files that loading an artifact reads; the checksums cover these.
LOADED = (
    *(*WEIGHTS, *CODE, *TOKENIZER, *SENTENCES, *ADAPTER),
    *("config.json", "generation_config.json", "recipe.yaml", "medusa.safetensors"),
)
# Files that a push publishes.
PUBLISHED = (*LOADED, *REPORTS, "linearize.json", "README.md", "LICENSE*", "NOTICE*")
# Files that the commands write into an artifact, or Python when it imports the code.
WRITTEN = (
    *(*LOADED, *HEADS, *REPORTS),
    *("linearize.json", "README.md", "log.jsonl"),
    "__pycache__/*.pyc",
)


def foreign_files(folder: Path) -> Iterator[str]:
    """Yield the relative paths of files and links in an artifact's folder that no command wrote.

    A file that `linearize.json` lists under `checksums` belongs to the artifact, whatever its name.
    """
    patterns = [pattern.split("/") for name in WRITTEN for pattern in (name, name + SUFFIX)]
    named = recorded(folder)
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        for name in (*files, *links):
            path = Path(place, name).relative_to(folder)
            if path.as_posix() not in named and not any(matches(path.parts, p) for p in patterns):
                yield path.as_posix()


def published_files(folder: Path) -> set[str]:
    """Return the relative paths of an artifact's files that a push publishes.

    Files under `checksums` in `linearize.json` are published too, whatever their names.
    """
    patterns, named = [pattern.split("/") for pattern in PUBLISHED], recorded(folder)
    paths = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    return {
        path.as_posix()
        for path in paths
        if path.as_posix() in named or any(matches(path.parts, pattern) for pattern in patterns)
    }


def matches(parts: tuple[str, ...], pattern: list[str]) -> bool:
    """Return True if the parts of a path match the parts of a pattern. `*` does not match `/`."""
    return len(parts) == len(pattern) and all(map(fnmatchcase, parts, pattern))


def recorded(folder: Path) -> set[str]:
    """Return the paths of the files that `linearize.json` lists under `checksums`.

    The set is empty if there are none, or if `linearize.json` cannot be read.
    """
    try:
        checksums = json.loads((folder / "linearize.json").read_text())["checksums"]
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    return set(checksums) if isinstance(checksums, dict) else set()
