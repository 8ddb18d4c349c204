"""Write files whole or not at all, and check beforehand that they can be written."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from linearize_cli.errors import UserError

SUFFIX = ".partial"  # of a file that is being written


@contextmanager
def replacing(path: str | Path, suffix: str = SUFFIX, sync: bool = True) -> Iterator[Path]:
    """Yield a path beside `path` to write to; at the end, sync that file and rename it to `path`.

    A kill leaves the old file or the new one. A link is followed; a device or a pipe is written to directly.

    Args:
        suffix: that of the file beside; of its own for each process, where several write the same file.
        sync: wait until the content is on disk, so that a power failure leaves one of the two files, too.

    Raises:
        OSError: the file cannot be written. Nothing is left of it.
    """
    if is_stream(path):
        yield Path(path)
        return
    path = Path(os.path.realpath(path))
    beside = path.with_name(path.name + suffix)
    try:
        yield beside
        if sync:
            with beside.open("rb+") as written:
                os.fsync(written.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def is_stream(path: str | Path) -> bool:
    """Return whether `path` is there and neither a file nor a folder."""
    return os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path))


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, whole or not at all. Raises OSError as `replacing`."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: str | Path, data: Any) -> None:
    """Write data as JSON, whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: str | Path, error: OSError) -> UserError:
    """Return the error that says which file cannot be written, and why."""
    return UserError(f"cannot write {path}: {error.strerror}", "Choose another place.")


def check_writable(path: str | Path, option: str = "") -> None:
    """Refuse a path at which no file can be written. Nothing is left there.

    Args:
        option: the option that names the path, for the message.

    Raises:
        UserError: it is a folder, lies in none, or the system refuses a new file beside it.
    """
    name = f"{option} {path}".strip()
    if is_stream(path):
        return
    if os.path.isdir(path):
        raise UserError(f"{name} is a folder", "Name a file, or move the folder away.")
    beside = Path(os.path.realpath(path) + SUFFIX)
    if not beside.parent.is_dir():
        raise UserError(f"{name}: its folder does not exist", "Create it, or choose another place.")
    try:
        beside.touch()
        beside.unlink()
    except OSError as error:
        raise cannot_write(name, error) from error
