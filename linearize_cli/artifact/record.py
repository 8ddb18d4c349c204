"""The two files that describe an artifact: `linearize.json`, and the part `linearize` of `config.json`."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from linearize_cli.errors import UserError, first_five
from linearize_cli.files import write_json
from linearize_cli.inputs import read_object
from linearize_cli.methods.recipe import LARGEST, Attention

REPORT, CONFIG = "linearize.json", "config.json"
SEALED = ("eval.json", "bench.json", "verify.json")  # reports with a sum of their own, like linearize.json
SUM = "sum"  # its key
AGAIN = "Convert again, or download the artifact again."
Text = Annotated[str, Field(pattern=r"^[^\x00]*$")]
Texts = dict[str, Text | None]
Counts = dict[str, int | None]
Numbers = dict[str, float | None]
# The distances from the teacher that measure tasks without labels, with the titles of their tables.
DISTANCES = {
    "kl": "KL from the teacher, nats",
    "embedding_distance": "distance from the teacher's embedding, 1 - cosine",
}
# The type of each field. Null is always allowed.
FIELDS: dict[str, Any] = {
    "schema": int,
    "base_model": Text,
    "method": Text,
    "layers": dict[str, list[Text | None] | None],
    "seq_len": int,
    "tokens": Counts,
    "perplexity": Numbers,
    "ablation": Numbers,
    **dict.fromkeys(DISTANCES, Numbers),
    "self_check": Numbers,
    "state_bytes": int,
    "kv_bytes_per_token": float,
    "seconds": Numbers,
    "versions": Texts,
    "medusa": dict[str, Any],
    "task": Text,
    "checksums": Texts,
    SUM: Text,
    "fingerprint": dict[str, Any],
    "card": Text,
    "command": Text,
    "origin": dict[str, Any],
}
CONVERSION: dict[str, Any] = {
    "base_class": Text,
    "base_model_type": Text,
    "method": Text,
    "attention": dict[str, Any],
    "layers": dict[str, dict[str, float | bool | None] | None],
    "softmax": list[Text | None],
}
SIZES = ("heads", "kv_heads", "key_dim", "value_dim")
OPTIONAL = (*DISTANCES, "medusa", "task", "checksums", "fingerprint", "card", "command", "origin", SUM)


def summed(report: dict[str, Any]) -> dict[str, Any]:
    """Return a report with the SHA-256 sum of its contents under `sum`. A later change can then be found."""
    return {**report, SUM: content_sum(report)}


def edited(report: dict[str, Any]) -> bool:
    """Return True if a report was changed since it got its sum. A report without one counts as unchanged."""
    return SUM in report and report[SUM] != content_sum(report)


def content_sum(report: dict[str, Any]) -> str:
    """Return the SHA-256 sum of a report's contents. It does not depend on the order of keys or on spaces."""
    plain = json.loads(json.dumps({key: value for key, value in report.items() if key != SUM}))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write `linearize.json` atomically. `record` gets its sum.

    Raises:
        UserError: the file cannot be written.
    """
    record[SUM] = content_sum(record)
    write_json(folder / REPORT, record)


def read_record(folder: Path, whole: bool = False) -> dict[str, Any]:
    """Return the contents of `linearize.json`.

    Args:
        whole: True to require the file and all its fields. Otherwise a missing file gives an empty dict.

    Raises:
        UserError: the file cannot be read, a field has the wrong type, or a required field is missing.
    """
    path = folder / REPORT
    if not path.exists() and not whole:
        return {}
    record = read_object(path, AGAIN)
    if faults := report_faults(record, whole):
        raise UserError(f"{path} is not a report of a conversion: {'; '.join(faults[:5])}", AGAIN)
    return record


def report_faults(record: dict[str, Any], whole: bool = False) -> list[str]:
    """Return a phrase for each error in the contents of `linearize.json`. A valid report gives an empty list.

    Args:
        whole: True if a missing required field is an error too.
    """
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
    """Return the contents of `config.json`, or an empty dict if there is none (Meta's format).

    Raises:
        UserError: the file cannot be read, or its part `linearize` or `auto_map` is invalid.
    """
    path = folder / CONFIG
    if not path.exists():
        return {}
    config = read_object(path, AGAIN)
    if "linearize" in config and (faults := conversion_faults(config)):
        raise UserError(f"{path} is not the config of a converted model: {'; '.join(faults[:5])}", AGAIN)
    return config


def conversion_faults(config: dict[str, Any]) -> list[str]:
    """Return a phrase for each error in the `linearize` and `auto_map` parts of a config."""
    record = config["linearize"]
    if not isinstance(record, dict):
        return ["linearize is not an object"]
    faults = misfits({"auto_map": config.get("auto_map")}, {"auto_map": Texts}) + misfits(record, CONVERSION)
    if faults:
        return faults
    if missing := [key for key in CONVERSION if record.get(key) is None]:
        return [f"linearize lacks {first_five(missing)}"]
    faults = Attention.faults(record["attention"], "linearize.attention.")
    for name, geometry in record["layers"].items():
        sizes = [(geometry or {}).get(size) for size in SIZES]
        if not all(type(size) is int and 0 < size <= LARGEST for size in sizes):
            faults.append(f"linearize.layers.{name} lacks one of {', '.join(SIZES)}")
    return faults


def misfits(data: dict[str, Any], kinds: dict[str, Any]) -> list[str]:
    """Return a phrase for each field of `data` whose value has the wrong type.

    Args:
        kinds: the type of each field, by key.
    """
    return [f"{key} is {data[key]!r:.60}" for key in kinds if key in data and not fits(data[key], kinds[key])]


def fits(value: Any, kind: Any) -> bool:
    """Return True if a value is None or has the given type.

    Args:
        kind: a type that pydantic can check, such as `int` or `dict[str, float]`.
    """
    try:
        TypeAdapter(kind | None, config=ConfigDict(strict=True)).validate_python(value)
    except ValidationError:
        return False
    return True
