"""Atomic writing of files, and checks that a file can be written."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from linearize_cli.errors import UserError

SUFFIX = ".partial"  # suffix of a file that is being written


@contextmanager
def replacing(path: str | Path, suffix: str = SUFFIX, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path next to `path`, and rename the file written there to `path` at the end of the
    context.

    If the process is killed, either the old or the new file is there. If `path` is a symbolic link, its
    target is replaced. A device or a pipe is written to directly.

    Args:
        suffix: the suffix of the temporary file. Processes that write the same file need different ones.
        sync: wait until the content is on disk, so that a power failure leaves the old or the new file too.

    Raises:
        OSError: the file cannot be written. The temporary file is deleted.
    """
    if is_stream(path):
        yield Path(path)
        return
    path = Path(os.path.realpath(path))
    temporary = path.with_name(path.name + suffix)
    try:
        yield temporary
        if sync:
            with temporary.open("rb+") as written:
                os.fsync(written.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def is_stream(path: str | Path) -> bool:
    """Return True if `path` exists and is neither a file nor a folder, but a device or a pipe for example."""
    return os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path))


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically.

    Raises:
        OSError: the file cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, data: Any) -> None:
    """Write data as JSON atomically.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: str | Path, error: OSError) -> UserError:
    """Return the error that says which file cannot be written, and why."""
    return UserError(f"cannot write {path}: {error.strerror}", "Choose another path.")


def check_writable(path: str | Path, option: str = "") -> None:
    """Check that a file can be written at a path. The check leaves no file behind. A device or a pipe is
    always accepted.

    Args:
        option: the option that names the path, for the message. Empty if none does.

    Raises:
        UserError: the path is a folder, its folder does not exist, or the system refuses a new file there.
    """
    name = f"{option} {path}".strip()
    if is_stream(path):
        return
    if os.path.isdir(path):
        raise UserError(f"{name} is a folder", "Pass the path of a file, or move the folder away.")
    temporary = Path(os.path.realpath(path) + SUFFIX)
    if not temporary.parent.is_dir():
        raise UserError(f"{name}: its folder does not exist", "Create it, or choose another path.")
    try:
        there = temporary.exists()
        temporary.touch()
        if not there:  # it may be a file of the user
            temporary.unlink()
    except OSError as error:
        raise cannot_write(name, error) from error
