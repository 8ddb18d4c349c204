"""The report of `verify`: the contents of `verify.json`, and its table and sentences."""

from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from transformers import PreTrainedModel

from linearize_cli.tables import table
from linearize_cli.verification import speed
from linearize_cli.verification.check import FAIL, TIE, Finding
from linearize_cli.versions import versions

# Hints for failed checks of the folder.
ADVICE = {
    "code": "To verify the artifact's own code, read it first, then add --trust-remote-code.",
    "files": "Download or convert the artifact again. If the changes are yours, record them with `linearize seal`.",
}
# The parts of `verify.json` before any check has run.
PARTS = {
    "tree": None,
    "forms": {"prefill_vs_decode": None, "chunked_vs_decode": None},
    "greedy": None,
    "rollback": {"max_abs_diff": None},
    "padding": {"max_abs_diff": None},
    "drift": None,
    "rows": None,
    "drafts": None,
    "definition": None,
    "long": None,
    "code": None,
    "files": None,
    "fingerprint": None,
    "float32": None,
    "sampling": None,
    "acceptance": None,
    "speed": None,
}


def report_of(found: list[Finding], model: PreTrainedModel, noise: float | None, seed: int) -> dict[str, Any]:
    """Return the contents of `verify.json`. Parts of checks that did not run are None.

    Args:
        found: the results of all checks.
        noise: the rounding noise of the logits, or None if it was not measured.
    """
    lines, failed = [line for finding in found for line in finding.lines], failures(found)
    ties = any(line.verdict == TIE for line in lines)
    return {
        "verdict": FAIL if failed else "NUMERICAL_TIE" if ties else "EXACT",
        "failed": failed,
        **PARTS,
        **{key: value for finding in found for key, value in finding.data.items()},
        "checks": [asdict(line) for line in lines],
        "limits": {name: limit for finding in found for name, limit in finding.limits.items()},
        "noise": noise,
        "dtype": str(model.dtype).removeprefix("torch."),
        "seed": seed,
        "versions": versions(),
    }


def failures(found: list[Finding]) -> list[str]:
    """Return the names of the checks that failed, each once."""
    return list(
        dict.fromkeys(line.name for finding in found for line in finding.lines if line.verdict == FAIL)
    )


def render(report: dict[str, Any]) -> RenderableType:
    """Return a report of `verify` as a table and sentences."""
    rows = table("check", "measured", "limit", "")
    for line in report["checks"]:
        rows.add_row(line["name"].replace("_", " "), line["measured"], line["limit"], line["verdict"])
    said = speed.sentence(report)
    return Group(rows, "", f"{report['verdict']}: {sentence(report)}", *([said] if said else []))


def sentence(report: dict[str, Any]) -> str:
    """Return the sentence that explains a report's verdict. If a check of the folder failed, add advice."""
    if report["verdict"] == FAIL:
        names = ", ".join(name.replace("_", " ") for name in report["failed"])
        advice = [text for name, text in ADVICE.items() if name in report["failed"]]
        return " ".join([f"these checks failed: {names}.", *advice])
    agree = f"all forms of the model agree within the rounding of {report['dtype']}"
    if report["code"] and not report["files"]:
        agree = f"the files have no checksums to compare with; {agree}"
    greedy = report["greedy"]
    if greedy is None:
        return f"{agree}."
    if report["verdict"] == "EXACT":
        return f"{agree}, and so do all {greedy['tokens']:,} greedy tokens of {greedy['prompts']} prompts."
    return f"{agree}; {greedy['mismatches']} of {greedy['tokens']:,} greedy tokens differ, each at a tie of logits."
