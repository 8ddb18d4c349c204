"""Folders of sentence-transformers: the modules that follow the model in `modules.json`."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from linearize_cli.errors import UserError
from linearize_cli.inputs import read_json, read_object

MODULES = "modules.json"
FOLDER = "[1-9]_*"  # name of a module's folder, such as 1_Pooling
# Files of the library beside the model's own, and in the folder of a module.
FILES = (MODULES, "sentence_*_config.json", "config_sentence_transformers.json")
MODULE_FILES = ("config.json", "model.safetensors", "pytorch_model.bin")
# Poolings that conversion can recover. Older configs have a boolean for each pooling.
POOLINGS = ("mean", "cls")
LEGACY = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
HINT = f"Remove {MODULES} to convert the model alone, with the mean of its hidden states as the embedding."


@dataclass(frozen=True)
class SentenceFolder:
    """A folder of sentence-transformers whose model's hidden states are pooled into one embedding.

    Attributes:
        path: the folder.
        modules: the names of the folders of the modules after the model.
        pooling: the pooling, one of POOLINGS.
    """

    path: Path
    modules: tuple[str, ...]
    pooling: str

    @classmethod
    def read(cls, path: str | Path) -> SentenceFolder | None:
        """Read the modules of a folder. Return None if it has no `modules.json`, or one without pooling.

        Raises:
            UserError: `modules.json` is damaged, or a module or the pooling is not supported.
        """
        file, entries = Path(path, MODULES), read_modules(Path(path))
        kinds = [entry["type"].rpartition(".")[2] for entry in entries]
        if "Pooling" not in kinds:
            return None
        if foreign := [
            entry["type"] for entry in entries if not entry["type"].startswith("sentence_transformers.")
        ]:
            raise UserError(f"{file} names a module that is not the library's own: {foreign[0]}", HINT)
        if kinds[0] != "Transformer" or entries[0]["path"]:
            raise UserError(
                f"{file}: the first module is {kinds[0]} in `{entries[0]['path']}`, not the model beside it",
                'Move the model\'s files beside it and set the path to "".',
            )
        if odd := [entry["path"] for entry in entries[1:] if not is_module_folder(entry["path"])]:
            raise UserError(f"{file} names a module's folder {odd[0]!r}", "Rename it like 1_Pooling.")
        names = tuple(entry["path"] for entry in entries[1:])
        return cls(Path(path), names, read_pooling(Path(path, entries[kinds.index("Pooling")]["path"])))

    def copy_to(self, artifact: Path) -> None:
        """Copy the library's files and the folders of the modules into an artifact."""
        files = [file for name in FILES for file in self.path.glob(name)]
        files += [self.path / name / file for name in self.modules for file in MODULE_FILES]
        for file in filter(Path.is_file, files):
            target = artifact / file.relative_to(self.path)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)


def read_modules(folder: Path) -> list[dict[str, Any]]:
    """Return the entries of `modules.json`, or an empty list if the folder has none.

    Raises:
        UserError: the file cannot be read, or an entry has no type or no path.
    """
    file = folder / MODULES
    entries = read_json(file, HINT) if file.exists() else []
    if not isinstance(entries, list) or not all(map(is_entry, entries)):
        raise UserError(f"{file} is not a list of modules with a type and a path", HINT)
    return entries


def is_entry(value: Any) -> bool:
    """Return True if a JSON value has the type and the path of a module."""
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("type", "path"))


def is_module_folder(name: str) -> bool:
    """Return True if a path is a plain folder name like `1_Pooling`."""
    return fnmatchcase(name, FOLDER) and not {"/", "\\"} & {*name}


def read_pooling(folder: Path) -> str:
    """Return the pooling in the folder of the pooling module, one of POOLINGS.

    Raises:
        UserError: its config cannot be read, or names another pooling or several.
    """
    file = folder / "config.json"
    config = read_object(file, HINT)
    found = config.get("pooling_mode")
    if found is None:
        named = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
        found = LEGACY.get(named[0], named[0]) if len(named) == 1 else named or "mean"
    if found not in POOLINGS:
        raise UserError(
            f"{file}: the pooling {found} cannot be recovered, only {' or '.join(POOLINGS)}", HINT
        )
    return found
