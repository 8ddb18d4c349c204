"""Reads what a user names: paths, text, JSON and YAML. Whatever cannot be read is a UserError."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from linearize_cli.errors import UserError

JSON_BYTES, YAML_BYTES = 64 << 20, 64 << 10  # of a file at most: PyYAML takes a second for 100 kB
DEEPEST = 50  # levels of a YAML file
SURROGATE = re.compile("[\ud800-\udfff]")


def user_path(name: str | Path, hint: str = "Name another file or folder.") -> Path:
    """Return the path that a user names, with `~` expanded. Nothing needs to be there.

    Raises:
        UserError: the file system does not take the name, or does not let the user look there.
    """
    try:
        path = Path(name).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return path
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{name} cannot be used as a path: {reason}", hint) from None
    return path


def read_text(file: Path, hint: str = "", most: int = JSON_BYTES) -> str:
    """Return the text of a UTF-8 file, without its byte order mark.

    Raises:
        UserError: the file cannot be read, is not UTF-8, or has more than `most` bytes.
    """
    try:
        with file.open("rb") as stream:
            data = stream.read(most + 1)
        if len(data) > most:
            raise UserError(f"{file} cannot be read: it is larger than {most:,} bytes", hint)
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} cannot be read: it is not UTF-8 text (byte {error.start:,})", hint) from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}", hint) from None


def read_json(file: Path, hint: str = "") -> Any:
    """Return what a JSON file holds.

    Raises:
        UserError: the file cannot be read, or is not JSON.
    """
    text = read_text(file, hint)
    try:
        return mended(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON: {error}", hint) from None


def read_object(file: Path, hint: str = "") -> dict[str, Any]:
    """Return the object that a JSON file holds. Raises UserError: see `read_json`, or it holds something else."""
    found = read_json(file, hint)
    if not isinstance(found, dict):
        raise UserError(f"{file} is not a JSON object", hint)
    return found


class _Loader(yaml.SafeLoader):
    """Plain YAML: no aliases, which grow without bound, no dates, and not more than DEEPEST levels."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias (*NAME): write the value out")
        if self.depth == DEEPEST:
            raise yaml.YAMLError(f"it has more than {DEEPEST} levels")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str) -> Any:
    """Return what a YAML text holds.

    Raises:
        ValueError: the text is not YAML, or has aliases, too many levels or a number that is too long.
    """
    try:
        found = mended(yaml.load(text, _Loader))
        repr(found)  # a message may quote it: Python refuses to write out integers of thousands of digits
        return found
    except (
        yaml.YAMLError,
        ValueError,
        ArithmeticError,
        LookupError,
        AttributeError,
        RecursionError,
    ) as error:
        # PyYAML lets the errors of int, float and dates pass, and those of its own slips at odd tags.
        raise ValueError(" ".join(str(error).split())) from None


def read_yaml(file: Path, hint: str = "") -> Any:
    """Return what a YAML file holds.

    Raises:
        UserError: the file cannot be read, or is not YAML.
    """
    text = read_text(file, hint, YAML_BYTES)
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise UserError(f"{file} is not valid YAML: {error}", hint) from None


def mended(data: Any) -> Any:
    """Replace lone surrogates, which are not valid Unicode, by U+FFFD in every string of plain data."""
    if isinstance(data, str):
        return SURROGATE.sub("\ufffd", data)
    if isinstance(data, list):
        return [mended(entry) for entry in data]
    if isinstance(data, dict):
        return {mended(key): mended(value) for key, value in data.items()}
    return data
