"""`compare`: the numbers of several artifacts side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from linearize_cli.errors import UserError
from linearize_cli.pages.measured import Measured, read_measured

# Numbers that mean the same for two artifacts only if these are equal too.
SHARED = ("base model", "perplexity, teacher", "eval: text")


def compare(artifacts: Sequence[str | Path]) -> dict[str, Any]:
    """Read the numbers of artifacts.

    Args:
        artifacts: at least two folders of artifacts.

    Returns:
        `artifacts`: the names, in order. `rows`: the numbers as text, for each label a list in the order of the
            artifacts; a number that was not measured is None. `notes`: what makes numbers incomparable.

    Raises:
        UserError: there are fewer than two artifacts, one is no artifact, or a report is damaged.
    """
    if isinstance(artifacts, str | Path) or len(artifacts) < 2:
        raise UserError("compare needs at least two artifacts", "Pass their folders.")
    return side_by_side([read_measured(artifact) for artifact in artifacts])


def side_by_side(found: list[Measured]) -> dict[str, Any]:
    """Return the numbers of artifacts side by side (see `compare`)."""
    numbers = [one.numbers() for one in found]
    labels = in_order(numbers)
    rows = {label: [one.get(label) for one in numbers] for label in labels}
    values = {label: sorted({*rows.get(label, ())} - {None, "-"}) for label in SHARED}
    notes = [f"{label} differs: {'; '.join(found)}" for label, found in values.items() if len(found) > 1]
    return {"artifacts": names(found), "rows": rows, "notes": notes}


def in_order(numbers: list[dict[str, str]]) -> list[str]:
    """Return the labels of all artifacts, each once. A label that the first artifact lacks is placed behind the label
    that it follows in its own artifact.
    """
    labels = list(numbers[0])
    for one in numbers[1:]:
        place = 0
        for label in one:
            if label not in labels:
                labels.insert(place, label)
            place = labels.index(label) + 1
    return labels


def names(found: list[Measured]) -> list[str]:
    """Return the artifacts' names. Two that share a folder name are shown with their parent's folder."""
    counts = Counter(one.name for one in found)
    return [
        one.name if counts[one.name] == 1 else f"{one.folder.resolve().parent.name}/{one.name}"
        for one in found
    ]
