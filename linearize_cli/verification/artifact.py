"""Checks of the artifact's folder: the code that runs, the checksums of its files, and its fingerprint."""

from pathlib import Path

import torch
from transformers import PreTrainedConfig

from linearize_cli.artifact.checksums import changed, edited_reports
from linearize_cli.artifact.fingerprint import differences, in_float32
from linearize_cli.artifact.record import REPORT, read_record
from linearize_cli.errors import first_five
from linearize_cli.metrics.selfcheck import TOLERANCE
from linearize_cli.runtime.bundle import sources
from linearize_cli.verification.check import FAIL, OK, Finding, Line, Subject, not_checked


def code(subject: Subject) -> Finding:
    """Report whether the artifact's own runtime code is verified, or this package's.

    The check fails if this package's code runs and differs from the artifact's.
    """
    if not type(subject.model).__module__.startswith("linearize_cli."):
        return Finding({"code": {"ran": "artifact", "differs": []}}, [Line("code", "the artifact's own")])
    differs = sorted(name for name, text in sources().items() if content(subject.artifact / name) != text)
    data = {"code": {"ran": "package", "differs": differs}}
    if not differs:
        return Finding(data, [Line("code", "this package's; the artifact's is the same", "", OK)])
    said = f"this package's; the artifact's differs: {first_five(differs)}"
    return Finding(data, [Line("code", said, "", FAIL)])


def content(path: Path) -> str | None:
    """Return the text of a file, or None if it is missing or not valid UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def files(subject: Subject) -> Finding:
    """Compare the artifact's files with the checksums recorded in linearize.json. The check is not run if it
    has none.
    """
    if not (subject.artifact / REPORT).exists():
        said = "linearize.json is missing: fetch the artifact again, or convert again"
        return Finding(lines=[Line("files", said, "", FAIL)])
    record = read_record(subject.artifact)
    if not record.get("checksums"):
        return not_checked("files", "linearize.json has no checksums; `linearize seal` adds them")
    differing = changed(record, subject.artifact)
    if reports := edited_reports(subject.artifact):
        differing = "; ".join(filter(None, [differing, f"changed: {first_five(reports)}"]))
    said = (
        f"since it was saved, {differing}"
        if differing
        else f"{len(record['checksums'])} match their checksums"
    )
    return Finding({"files": {"changed": differing}}, [Line("files", said, "", FAIL if differing else OK)])


def fingerprint(subject: Subject) -> Finding:
    """Compare the model with the fingerprint in linearize.json: logits of fixed sequences, and the tokens of
    a fixed text.

    The check is not run if there is no fingerprint, or if the model cannot run precisely enough to compare.
    """
    recorded = read_record(subject.artifact).get("fingerprint")
    if recorded is None:
        return not_checked("fingerprint", "linearize.json has no fingerprint; `linearize seal` adds one")
    model = subject.model
    if torch.finfo(model.dtype).eps > torch.finfo(saved_dtype(subject)).eps:
        why = f"--dtype {model.dtype} rounds the saved weights".replace("torch.", "")
        return not_checked("fingerprint", why)
    computed = getattr(torch, str(recorded.get("dtype")), None)
    if computed not in TOLERANCE:
        return Finding(lines=[Line("fingerprint", "the fingerprint in linearize.json is damaged", "", FAIL)])
    if TOLERANCE[computed] < TOLERANCE[model.dtype]:
        model = in_float32(model)
    if model is None:
        return not_checked("fingerprint", "not enough memory for a float32 copy of the model")
    try:
        diff, largest, same_text = differences(recorded, subject.task, model, subject.tokenizer)
    except ValueError as error:
        return Finding(lines=[Line("fingerprint", str(error), "", FAIL)])
    limit = TOLERANCE[computed] * max(1.0, largest)
    said = f"{diff:.1e}" + ("" if same_text else "; the tokenizer splits the fixed text differently")
    line = Line("fingerprint", said, f"{limit:.1e}", OK if diff <= limit and same_text else FAIL)
    data = {
        "fingerprint": {"max_abs_diff": min(diff, torch.finfo(torch.float32).max), "tokenizer": same_text}
    }
    return Finding(data, [line], {"fingerprint": limit})


def saved_dtype(subject: Subject) -> torch.dtype:
    """Return the dtype of the saved weights that config.json names. If it names none, return the model's
    dtype.
    """
    config, _ = PreTrainedConfig.get_config_dict(subject.artifact)
    return getattr(torch, str(config.get("dtype")), subject.model.dtype)
