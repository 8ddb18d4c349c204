"""Comparison of an artifact with its checksums, for the commands."""

from pathlib import Path
from typing import Any

from linearize_cli.artifact.record import REPORT, SEALED, edited, read_record
from linearize_cli.checksums import differing
from linearize_cli.errors import UserError, first_five
from linearize_cli.inputs import read_object


def changed(record: dict[str, Any], folder: Path, besides: str = "") -> str:
    """Return a list, as text, of the files that differ from their checksums: changed, missing or new.

    Return an empty text if none differs, or if no checksums are recorded.

    Args:
        record: the contents of `linearize.json`, which has a sum of its own.
        besides: the relative path of a file to leave out. Empty: compare all.
    """
    recorded = record.get("checksums")
    kinds = differing(recorded, folder, besides) if recorded else {"changed": set()}
    if edited(record):
        kinds["changed"].add(REPORT)
    return "; ".join(f"{kind}: {first_five(names)}" for kind, names in kinds.items() if names)


def edited_reports(folder: Path) -> list[str]:
    """Return the names of the reports of `eval`, `bench` and `verify` that were changed since they were written, or
    cannot be read.
    """
    names = []
    for name in SEALED:
        try:
            if (folder / name).is_file() and edited(read_object(folder / name)):
                names.append(name)
        except UserError:
            names.append(name)
    return names


def check_unchanged(folder: Path, name: str, besides: str = "") -> None:
    """Check that an artifact's files are those that were saved. Without recorded checksums, nothing is checked.

    Args:
        folder: the artifact's folder.
        name: the name in the error: the folder's path or a Hub id. For a Hub id, files that were not downloaded are
            left out.
        besides: the relative path of a file to leave out.

    Raises:
        UserError: a file was changed, is missing or is new. The message names it.
    """
    record = read_record(folder)
    if name != str(folder) and record.get("checksums") and not edited(record):
        here = {file: value for file, value in record["checksums"].items() if (folder / file).is_file()}
        record = {"checksums": here}
    if since := changed(record, folder, besides):
        raise UserError(
            f"{name}: its files are not those that were saved: {since}",
            "Download or convert it again. If you changed it yourself, `linearize seal` records that.\n"
            "To load it anyway, add --no-checksums (`generate`, `eval`, `bench`, `serve`).",
        )
