"""The files that belong to an artifact."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from linearize_cli.checksums import LOADED, matches
from linearize_cli.files import SUFFIX

HEADS = ("medusa.safetensors", "medusa.jsonl")
REPORTS = ("verify.json", "eval.json", "eval-*.png", "bench.json", "bench.png", "report.html")
# Files that a push publishes.
PUBLISHED = (*LOADED, *REPORTS, "linearize.json", "README.md", "LICENSE*", "NOTICE*")
# Files that the commands write into an artifact, or Python when it imports the code.
WRITTEN = (
    *(*LOADED, *HEADS, *REPORTS),
    *("linearize.json", "README.md", "log.jsonl"),
    "__pycache__/*.pyc",
)


def foreign_files(folder: Path) -> Iterator[str]:
    """Yield the relative paths of files and links in an artifact's folder that no command wrote.

    A file that `linearize.json` lists under `checksums` belongs to the artifact, whatever its name.
    """
    patterns = [pattern.split("/") for name in WRITTEN for pattern in (name, name + SUFFIX)]
    named = recorded(folder)
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        for name in (*files, *links):
            path = Path(place, name).relative_to(folder)
            if path.as_posix() not in named and not any(matches(path.parts, p) for p in patterns):
                yield path.as_posix()


def published_files(folder: Path) -> set[str]:
    """Return the relative paths of an artifact's files that a push publishes.

    Files under `checksums` in `linearize.json` are published too, whatever their names.
    """
    patterns, named = [pattern.split("/") for pattern in PUBLISHED], recorded(folder)
    paths = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    return {
        path.as_posix()
        for path in paths
        if path.as_posix() in named or any(matches(path.parts, pattern) for pattern in patterns)
    }


def recorded(folder: Path) -> set[str]:
    """Return the paths of the files that `linearize.json` lists under `checksums`.

    The set is empty if there are none, or if `linearize.json` cannot be read.
    """
    try:
        checksums = json.loads((folder / "linearize.json").read_text())["checksums"]
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    return set(checksums) if isinstance(checksums, dict) else set()
