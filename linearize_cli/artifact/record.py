"""Reads the two files that say what an artifact is: `linearize.json` and the `linearize` part of `config.json`."""

from pathlib import Path
from typing import Any

from linearize_cli.errors import UserError, first_five
from linearize_cli.inputs import read_object
from linearize_cli.methods.recipe import LARGEST, Attention, build

REPORT, CONFIG = "linearize.json", "config.json"
AGAIN = "Convert again, or fetch the artifact again."
NUMBER = int | float
# The type of each field; {kind} is an object with such values, [kind] a list of them. Null is always allowed.
FIELDS: dict[str, Any] = {
    "schema": int,
    "base_model": str,
    "method": str,
    "layers": {"": [str]},
    "seq_len": int,
    "tokens": {"": int},
    "perplexity": {"": NUMBER},
    "ablation": {"": NUMBER},
    "kl": {"": NUMBER},
    "self_check": {"": NUMBER},
    "state_bytes": int,
    "kv_bytes_per_token": NUMBER,
    "seconds": {"": NUMBER},
    "versions": {"": str},
    "medusa": {"": object},
    "task": str,
    "checksums": {"": str},
    "fingerprint": {"": object},
    "card": str,
}
CONVERSION: dict[str, Any] = {
    "base_class": str,
    "base_model_type": str,
    "method": str,
    "attention": {"": object},
    "layers": {"": {"": NUMBER | bool}},
    "softmax": [str],
}
SIZES = ("heads", "kv_heads", "key_dim", "value_dim")
OPTIONAL = ("kl", "medusa", "task", "checksums", "fingerprint", "card")


def read_record(folder: Path, whole: bool = False) -> dict[str, Any]:
    """Return the contents of `linearize.json`, or an empty dict if there is no such file.

    Args:
        whole: refuse a report that lacks a field.

    Raises:
        UserError: the file cannot be read, or a field has the wrong type.
    """
    path = folder / REPORT
    if not path.exists() and not whole:
        return {}
    record = read_object(path, AGAIN)
    if faults := report_faults(record, whole):
        raise UserError(f"{path} is not a report of a conversion: {'; '.join(faults[:5])}", AGAIN)
    return record


def report_faults(record: dict[str, Any], whole: bool = False) -> list[str]:
    """Return what is wrong with the contents of `linearize.json`, a phrase for each fault."""
    faults = misfits(record, FIELDS)
    length = record.get("seq_len")
    if not faults and length is not None and not 1 <= length <= LARGEST:
        faults.append("seq_len is not a number of tokens")
    if whole and not faults:
        missing = FIELDS.keys() - record.keys() - {*OPTIONAL}
        missing |= {"layers.linear", "layers.softmax"} - {
            f"layers.{key}" for key in record.get("layers") or {}
        }
        missing |= {key for key in ("base_model", "method") if record.get(key) is None}
        faults += [f"it lacks {first_five(missing)}"] if missing else []
    return faults


def read_config(folder: Path) -> dict[str, Any]:
    """Return the contents of `config.json`, or an empty dict in a folder that has none (Meta's format).

    Raises:
        UserError: the file cannot be read, or its `linearize` or `auto_map` is not one that a conversion writes.
    """
    path = folder / CONFIG
    if not path.exists():
        return {}
    config = read_object(path, AGAIN)
    if "linearize" in config and (faults := conversion_faults(config)):
        raise UserError(f"{path} is not that of a conversion: {'; '.join(faults[:5])}", AGAIN)
    return config


def conversion_faults(config: dict[str, Any]) -> list[str]:
    """Return what is wrong with the `linearize` and `auto_map` parts of a config, a phrase for each fault."""
    record = config["linearize"]
    if not isinstance(record, dict):
        return ["linearize is not an object"]
    faults = misfits({"auto_map": config.get("auto_map")}, {"auto_map": {"": str}}) + misfits(
        record, CONVERSION
    )
    if faults:
        return faults
    if missing := [key for key in CONVERSION if record.get(key) is None]:
        return [f"linearize lacks {first_five(missing)}"]
    build(Attention, record["attention"], "linearize.attention.", faults)
    for name, geometry in record["layers"].items():
        sizes = [(geometry or {}).get(size) for size in SIZES]
        if not all(type(size) is int and 0 < size <= LARGEST for size in sizes):
            faults.append(f"linearize.layers.{name} lacks one of {', '.join(SIZES)}")
    return faults


def misfits(data: dict[str, Any], kinds: dict[str, Any]) -> list[str]:
    """Return a phrase for each field whose value is not of its kind."""
    return [f"{key} is {data[key]!r:.60}" for key in kinds if key in data and not fits(data[key], kinds[key])]


def fits(value: Any, kind: Any) -> bool:
    """Return whether a value is null or of a kind; see FIELDS."""
    if value is None:
        return True
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(fits(entry, kind[""]) for entry in value.values())
    if isinstance(kind, list):
        return isinstance(value, list) and all(fits(entry, kind[0]) for entry in value)
    if isinstance(value, bool) and kind in (int, NUMBER):
        return False
    return isinstance(value, kind) and not (kind is str and "\0" in value)
