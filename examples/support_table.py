"""The table of supported model types in docs/models.md, written from the results of tests/support/walk.py.

    python tests/support/walk.py walk.json && python examples/support_table.py walk.json docs/models.md

The table replaces the text between two marks in docs/models.md.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import transformers

START, END = "<!-- support table -->", "<!-- end of support table -->"


def table(outcomes: list[dict]) -> str:
    """Return a Markdown table of model types, with one row for each outcome and reason."""
    groups = defaultdict(list)
    for outcome in outcomes:
        why = "" if outcome["outcome"] == "unbuilt" else short(outcome["detail"])
        groups[outcome["outcome"], why].append(outcome["model_type"])
    converted = sum(len(types) for (outcome, _), types in groups.items() if outcome == "converted")
    refused = sum(len(types) for (outcome, _), types in groups.items() if outcome == "refused")
    lines = [
        f"Of the {len(outcomes)} causal model types of transformers {transformers.__version__}, "
        f"{converted + refused} were built from a tiny random config\nand have softmax layers; {converted} of these "
        f"({converted / (converted + refused):.0%}) were converted and passed every check (`tests/support/walk.py`).",
        "",
        "| | model types |",
        "| --- | --- |",
    ]
    for outcome in ("converted", "refused", "no softmax", "unbuilt"):
        rows = [(why, types) for (kind, why), types in groups.items() if kind == outcome]
        for why, types in sorted(rows, key=lambda row: (bool(row[0]), -len(row[1]))):
            but = f"{', but' if outcome == 'converted' else ''}: {why}" if why else ""
            lines.append(f"| **{outcome}**{but} | {', '.join(types)} |")
    return "\n".join(lines)


def short(detail: str) -> str:
    """Return a reason without class names and numbers, so that model types can share a row."""
    if "no layer calls" in detail:
        return "computes attention in its own code"
    if "does not run with" in detail:
        return "needs a cache of its own"
    if "calls attention" in detail:
        return "calls attention several times in one forward"
    return detail.replace("|", "/")


def main() -> None:
    """Replace the table in the document."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("walk", type=Path, help="JSON file written by tests/support/walk.py")
    parser.add_argument("readme", type=Path, help="document with the two marks, docs/models.md")
    arguments = parser.parse_args()
    text = arguments.readme.read_text()
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    if not after:
        parser.error(f"{arguments.readme} lacks the marks {START} and {END}")
    made = table(json.loads(arguments.walk.read_text()))
    arguments.readme.write_text(f"{before}{START}\n{made}\n{END}{after}")


if __name__ == "__main__":
    main()
