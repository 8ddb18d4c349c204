"""Checks that the weight files of a checkpoint fit its config.json, before and after loading."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize_cli.errors import Notice, UserError, first_five
from linearize_cli.inputs import read_object

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMATS = ("model*.safetensors", "pytorch_model*.bin")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# Keys of a config that count what is built in turn, and a number that no model comes near (Doge has 16,384 experts).
COUNTS = {re.compile(r"(layers?|blocks?|depth)$"): 2048, re.compile(r"experts?$"): 1 << 15}
PER_BYTE = 8  # weights that a byte can hold, of one bit each
FEW = 1 << 28  # weights that any machine has memory for
ONE_MODEL = "config.json and the weight files must be of one model, and all the weight files be there."


def weight_files(folder: str | Path) -> list[Path]:
    """Return the weight files of a checkpoint's folder; a Trainer leaves other .bin files beside them."""
    names = (*FORMATS, "adapter_model.safetensors", "adapter_model.bin")
    return sorted(file for name in names for file in Path(folder).glob(name))


def check_sizes(model: str, config: dict[str, Any]) -> None:
    """Refuse a config that counts more layers or experts than any model has: building them would take hours.

    Raises:
        UserError: which key.
    """
    for key, value in config.items():
        if isinstance(value, dict):
            check_sizes(model, value)
        most = next((most for name, most in COUNTS.items() if name.search(key)), None)
        if most and type(value) is int and value > most:
            raise UserError(f"{model}: {key} in config.json is {value:,}, more than {most:,}.", "Correct it.")


def check_files(model: str, folder: str | Path) -> None:
    """
    Raises:
        UserError: the folder has no weight files, or its index names files that are not in it.
    """
    folder = Path(folder)
    for index in (folder / name for name in INDEXES if (folder / name).is_file()):
        shards = read_object(index, ONE_MODEL).get("weight_map")
        names = (
            set(shards.values())
            if isinstance(shards, dict) and all(map(hashable, shards.values()))
            else {None}
        )
        if not all(isinstance(name, str) and name and Path(name).name == name for name in names):
            raise UserError(
                f"{index} names a file outside its folder, or no file.",
                "Its weight_map must map the name of each weight to the name of a file beside it.",
            )
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise UserError(
                f"{model} lacks the weight files {first_five(str(folder / name) for name in missing)}.",
                f"Download them into the folder: {index.name} names them.",
            )
    if not any((folder / name).is_file() for name in (*INDEXES, "model.safetensors", "pytorch_model.bin")):
        others = first_five(file.name for file in folder.glob("*.safetensors"))
        raise UserError(
            f"{model} has no weights: neither model.safetensors, pytorch_model.bin nor an index is there.",
            f"Download them into it{f', or rename them (it holds {others})' if others else ''}.",
        )


def hashable(value: Any) -> bool:
    return isinstance(value, str | int | float | None)


def check_total(model: str, shape: PreTrainedModel, folder: str | Path) -> None:
    """Refuse a model, built without its weights, that is far larger than its weight files.

    Raises:
        UserError: before the memory is allocated that a wrong config.json asks for.
    """
    held, wanted = sum(file.stat().st_size for file in weight_files(folder)), shape.num_parameters()
    if wanted > max(PER_BYTE * held, FEW):
        raise UserError(
            f"{model}: config.json asks for {wanted:,} weights, and the weight files hold {held:,} bytes.",
            ONE_MODEL,
        )


def check_loaded(model: str, loaded: PreTrainedModel, info: dict[str, Any]) -> None:
    """Check that every stored weight was loaded and that every parameter had one: transformers fills missing ones at
    random. Weights that the model has no place for are a Notice, unless they make it another model.

    Raises:
        UserError: weights are missing or have another shape; a layer or a bias would be left out; an adapter is there.
    """
    if missing := info["missing_keys"]:
        raise UserError(*_missing(model, loaded, missing))
    if info["mismatched_keys"]:
        shapes = [f"{name} is {list(here)}, not {list(due)}" for name, here, due in info["mismatched_keys"]]
        raise UserError(f"{model}, by config.json, has wrong shapes: {first_five(shapes)}.", ONE_MODEL)
    if getattr(loaded, "_hf_peft_config_loaded", False):
        raise UserError(f"{model} has a LoRA adapter beside it.", "Merge it with peft's merge_and_unload().")
    if left := info["unexpected_keys"]:
        if own := [name for name in left if _is_own(name, loaded)]:
            raise UserError(
                f"{model} holds weights that config.json has no place for: {first_five(own)}.",
                f"{ONE_MODEL} Without them it would be another model.",
            )
        text = f"{model}: weights that a {type(loaded).__name__} has no place for are left out: {first_five(left)}"
        warnings.warn(text, Notice, stacklevel=2)


def _missing(model: str, loaded: PreTrainedModel, missing: set[str]) -> tuple[str, str]:
    """Return what is missing and what to do. A model without a head lacks its head alone."""
    named = next(iter(loaded.config.architectures or ()), None)
    body = f"{loaded.base_model_prefix}."
    if named and named != type(loaded).__name__ and not any(name.startswith(body) for name in missing):
        return (
            f"{model} is a {named} without the head of a {type(loaded).__name__}: it lacks {first_five(missing)}.",
            "Choose a checkpoint with a language modelling or classification head.",
        )
    return f"{model} lacks the weights {first_five(missing)}.", ONE_MODEL


def _is_own(name: str, loaded: PreTrainedModel) -> bool:
    """Return whether a weight is one more layer of a kind that the model has, or one more part of such a layer."""
    text, index = loaded.config.get_text_config(decoder=True), re.search(r"\.layers\.(\d+)\.", name)
    drafting = getattr(text, "num_nextn_predict_layers", None) or 0
    if index and drafting and 0 <= int(index[1]) - text.num_hidden_layers < drafting:
        return False  # it only drafts (multi-token prediction), as the config says
    kinds = {_kind(key) for key in loaded.state_dict()}
    owner, _, _ = _kind(name).rpartition(".")
    return _kind(name) in kinds or f"{owner}.weight" in kinds


def _kind(name: str) -> str:
    """Return the name of a weight without the numbers of its layer and expert."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
