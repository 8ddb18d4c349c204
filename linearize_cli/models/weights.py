"""Checks that the weight files of a checkpoint match its config.json, before and after loading."""

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
# Config keys that count modules, and a limit far above any model's (Doge has 16,384 experts).
COUNTS = {re.compile(r"(layers?|blocks?|depth)$"): 2048, re.compile(r"experts?$"): 1 << 15}
PER_BYTE = 8  # largest number of weights in a byte, at one bit each
POOLER = "pooler."  # names of the pooler in a model without a head, whose hidden states do not depend on it
FEW = 1 << 28  # number of weights that fit on any machine
ONE_MODEL = "The config and the weight files must belong to one model, and no weight file may be missing."


def weight_files(folder: str | Path) -> list[Path]:
    """Return the weight files of a checkpoint's folder, without a Trainer's other .bin files."""
    names = (*FORMATS, "adapter_model.safetensors", "adapter_model.bin")
    return sorted(file for name in names for file in Path(folder).glob(name))


def check_sizes(model: str, config: dict[str, Any], file: str = "config.json") -> None:
    """Refuse a config with more layers or experts than any known model has. Building such a model would take
    hours.

    Args:
        config: the contents of config.json, or what transformers reads from a GGUF file.
        file: the file's name.

    Raises:
        UserError: a count is too large.
    """
    for key, value in config.items():
        if isinstance(value, dict):
            check_sizes(model, value, file)
        most = next((most for name, most in COUNTS.items() if name.search(key)), None)
        if most and type(value) is int and value > most:
            raise UserError(f"{model}: {key} in {file} is {value:,}, more than {most:,}.", "Correct it.")


def check_files(model: str, folder: str | Path) -> None:
    """Check that a folder has weight files, and every file that its index lists.

    Raises:
        UserError: files are missing, or the index is invalid.
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
                f"{index}: an entry of weight_map is not the name of a file in its folder.",
                "weight_map must map the name of each weight to the name of a file in the same folder.",
            )
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise UserError(
                f"{model} lacks the weight files {first_five(str(folder / name) for name in missing)}.",
                f"Download them into the folder. {index.name} lists them.",
            )
    if not any((folder / name).is_file() for name in (*INDEXES, "model.safetensors", "pytorch_model.bin")):
        others = first_five(file.name for file in folder.glob("*.safetensors"))
        raise UserError(
            f"{model} has no weights: no model.safetensors, no pytorch_model.bin and no index.",
            f"Download them into it{f', or rename them (it holds {others})' if others else ''}.\n"
            "A GGUF file beside config.json must be named: FOLDER/FILE.gguf, or owner/name:FILE.gguf on the Hub.",
        )


def hashable(value: Any) -> bool:
    """Return True if a JSON value can be an element of a set."""
    return isinstance(value, str | int | float | None)


def check_total(model: str, shape: PreTrainedModel, files: list[Path]) -> None:
    """Refuse a model that is far larger than its weight files, before memory is allocated for it.

    Args:
        model: the model's name in messages.
        shape: the model on the meta device.
        files: the weight files, or the GGUF file.

    Raises:
        UserError: the config describes far more weights than the files hold.
    """
    held, wanted = sum(file.stat().st_size for file in files), shape.num_parameters()
    if wanted > max(PER_BYTE * held, FEW):
        config = files[0].name if files[0].suffix == ".gguf" else "config.json"
        raise UserError(
            f"{model}: {config} describes {wanted:,} weights, but the weight files hold {held:,} bytes.",
            ONE_MODEL,
        )


def check_loaded(model: str, loaded: PreTrainedModel, info: dict[str, Any]) -> None:
    """Check that every parameter of a model was loaded from its files, and that no stored weight of it was
    ignored.

    transformers would fill missing weights at random. A stored weight that the model does not use is only
    reported as a Notice, unless the model would be another one with it. So is a missing pooler of a model
    without a head.

    Args:
        info: the loading info of `from_pretrained`.

    Raises:
        UserError: weights are missing or have another shape, a layer or a bias would be ignored, or there is
            an adapter.
    """
    without_pooler = {name for name in info["missing_keys"] if name.startswith(POOLER)}
    if missing := info["missing_keys"] - without_pooler:
        raise UserError(*_missing(model, loaded, missing))
    if without_pooler:
        text = f"{model}: it has no pooler, so the model gets a new one. Its hidden states do not need it."
        warnings.warn(text, Notice, stacklevel=2)
    if info["mismatched_keys"]:
        shapes = [f"{name} is {list(here)}, not {list(due)}" for name, here, due in info["mismatched_keys"]]
        raise UserError(
            f"{model} has weights whose shapes do not match its config: {first_five(shapes)}.", ONE_MODEL
        )
    if getattr(loaded, "_hf_peft_config_loaded", False):
        raise UserError(f"{model} contains a LoRA adapter.", "Merge it with peft's merge_and_unload().")
    if left := info["unexpected_keys"]:
        if own := [name for name in left if _is_own(name, loaded)]:
            raise UserError(
                f"{model} holds weights that config.json does not describe: {first_five(own)}.",
                f"{ONE_MODEL} Without these weights it would be another model.",
            )
        text = f"{model}: weights that {type(loaded).__name__} does not use are ignored: {first_five(left)}"
        warnings.warn(text, Notice, stacklevel=2)


def _missing(model: str, loaded: PreTrainedModel, missing: set[str]) -> tuple[str, str]:
    """Return the text and the hint of the error about missing weights. A missing LM or classification head
    has its own text.
    """
    named = next(iter(loaded.config.architectures or ()), None)
    body = f"{loaded.base_model_prefix}."
    if named and named != type(loaded).__name__ and not any(name.startswith(body) for name in missing):
        return (
            f"{model} is a {named} without the head of a {type(loaded).__name__}: it lacks {first_five(missing)}.",
            "Choose a checkpoint with a language modelling or classification head.",
        )
    return f"{model} lacks the weights {first_five(missing)}.", ONE_MODEL


def _is_own(name: str, loaded: PreTrainedModel) -> bool:
    """Return True if a stored weight that was not loaded belongs to a layer, or a part of a layer, that the
    config omits.

    Its kind (its name without numbers) must occur in the model. Layers for multi-token prediction are no such
    weights.
    """
    text, index = loaded.config.get_text_config(decoder=True), re.search(r"\.layers\.(\d+)\.", name)
    drafting = getattr(text, "num_nextn_predict_layers", None) or 0
    if index and drafting and 0 <= int(index[1]) - text.num_hidden_layers < drafting:
        return False  # the config says that it is for multi-token prediction only
    kinds = {_kind(key) for key in loaded.state_dict()}
    owner, _, _ = _kind(name).rpartition(".")
    return _kind(name) in kinds or f"{owner}.weight" in kinds


def _kind(name: str) -> str:
    """Return the name of a weight with the numbers of layer and expert replaced by `*`."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
