"""SHA-256 sums of the files that an artifact is loaded from."""

import hashlib
from pathlib import Path

from linearize_cli.artifact.contents import LOADED, matches
from linearize_cli.artifact.record import read_record
from linearize_cli.errors import UserError, first_five

CHUNK = 1 << 22  # bytes read at a time


def checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 sums of all files that loading an artifact may read, by relative path."""
    files = sorted(
        path for path in folder.rglob("*") if path.is_file() and is_loaded(path.relative_to(folder))
    )
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}


def is_loaded(path: Path) -> bool:
    """Return True if loading an artifact reads this file.

    Args:
        path: relative to the artifact's folder.
    """
    return any(matches(path.parts, pattern.split("/")) for pattern in LOADED)


def sha256(path: Path) -> str:
    """Return the SHA-256 sum of a file as a hexadecimal string."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def changed(recorded: dict[str, str], folder: Path, besides: str = "") -> str:
    """Return a list, as text, of the files that differ from their checksums: changed, missing or new.

    Return an empty text if none differs.

    Args:
        recorded: the SHA-256 sums by relative path.
        besides: the relative path of a file that does not count. Empty: all count.
    """
    now = checksums(folder)
    recorded, now = ({k: v for k, v in sums.items() if k != besides} for sums in (recorded, now))
    kinds = {
        "changed": [name for name in recorded.keys() & now.keys() if recorded[name] != now[name]],
        "missing": recorded.keys() - now.keys(),
        "new": now.keys() - recorded.keys(),
    }
    return "; ".join(f"{kind}: {first_five(names)}" for kind, names in kinds.items() if names)


def check_unchanged(folder: Path, name: str, besides: str = "") -> None:
    """Check that an artifact's files are those that were saved. Without recorded checksums, nothing is checked.

    Args:
        folder: the artifact's folder.
        name: the name in the error: the folder's path or a Hub id. For a Hub id, missing files are accepted,
            because not all are downloaded.
        besides: the relative path of a file that may differ.

    Raises:
        UserError: a file was changed, is missing or is new. The message names it.
    """
    recorded = read_record(folder).get("checksums") or {}
    if name != str(folder):
        recorded = {file: value for file, value in recorded.items() if (folder / file).is_file()}
    if recorded and (since := changed(recorded, folder, besides)):
        raise UserError(
            f"{name}: its files are not those that were saved: {since}",
            "Download or convert it again. If you changed it yourself, `linearize seal` records that.\n"
            "To load it anyway, add --no-checksums (`generate`, `eval`, `bench`).",
        )
