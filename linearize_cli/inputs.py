"""Readers of user input: paths, text, JSON and YAML. Input that cannot be read raises a UserError."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from linearize_cli.errors import UserError

JSON_BYTES, YAML_BYTES = 64 << 20, 64 << 10  # largest file sizes (PyYAML takes a second for 100 kB)
DEEPEST = 50  # largest number of levels in a YAML file
SURROGATE = re.compile("[\ud800-\udfff]")


def user_path(name: str | Path, hint: str = "Choose another file or folder.") -> Path:
    """Return the path that a user names, with `~` expanded. The path need not exist.

    Args:
        hint: the hint of the error.

    Raises:
        UserError: the file system rejects the name, or denies access.
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

    Args:
        hint: the hint of the error.
        most: the largest size in bytes.

    Raises:
        UserError: the file cannot be read, is not UTF-8, or is too large.
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
    """Return the contents of a JSON file.

    Args:
        hint: the hint of the error.

    Raises:
        UserError: the file cannot be read, or is not JSON.
    """
    text = read_text(file, hint)
    try:
        return without_surrogates(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON: {error}", hint) from None


def read_object(file: Path, hint: str = "") -> dict[str, Any]:
    """Return the object (a dict) in a JSON file.

    Raises:
        UserError: the file cannot be read, is not JSON, or is not an object.
    """
    found = read_json(file, hint)
    if not isinstance(found, dict):
        raise UserError(f"{file} is not a JSON object", hint)
    return found


class _Loader(yaml.SafeLoader):
    """A YAML loader without aliases (which can grow without bound), without dates, and with at most DEEPEST
    levels.
    """

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias (*NAME). Write the value instead")
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
    """Return the contents of a YAML text.

    Raises:
        ValueError: the text is not YAML, or has aliases, too many levels or a number with too many digits.
    """
    try:
        found = without_surrogates(yaml.load(text, _Loader))
        repr(found)  # a message may quote it, but Python refuses to print integers of thousands of digits
        return found
    except (
        yaml.YAMLError,
        ValueError,
        ArithmeticError,
        LookupError,
        AttributeError,
        RecursionError,
    ) as error:
        # PyYAML passes on errors of int and float, and its own errors at unusual tags.
        raise ValueError(" ".join(str(error).split())) from None


def read_yaml(file: Path, hint: str = "") -> Any:
    """Return the contents of a YAML file.

    Args:
        hint: the hint of the error.

    Raises:
        UserError: the file cannot be read, or is not YAML.
    """
    text = read_text(file, hint, YAML_BYTES)
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise UserError(f"{file} is not valid YAML: {error}", hint) from None


def without_surrogates(data: Any) -> Any:
    """Return JSON data in which U+FFFD replaces lone surrogates, which are not valid Unicode, in all strings
    and keys.
    """
    if isinstance(data, str):
        return SURROGATE.sub("\ufffd", data)
    if isinstance(data, list):
        return [without_surrogates(entry) for entry in data]
    if isinstance(data, dict):
        return {without_surrogates(key): without_surrogates(value) for key, value in data.items()}
    return data
