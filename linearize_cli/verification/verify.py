"""`verify`: whether a linearized model computes the same in every way in which it can be run."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import linearize_cli.runtime  # noqa: F401  lets transformers load artifacts
from linearize_cli.artifact.checksums import changed, checksums
from linearize_cli.artifact.fingerprint import in_float32
from linearize_cli.artifact.load import check_artifact
from linearize_cli.artifact.record import read_record
from linearize_cli.errors import UserError
from linearize_cli.files import check_writable, write_json
from linearize_cli.inputs import user_path
from linearize_cli.metrics.equivalence import rounding_noise, sample_rows
from linearize_cli.metrics.selfcheck import TOLERANCE
from linearize_cli.models.decoding import Decoder
from linearize_cli.models.load_errors import brief
from linearize_cli.models.tasks import Task, context_length, task_of
from linearize_cli.runtime.dispatch import converted
from linearize_cli.speculative.drafts import Drafter, Lookup
from linearize_cli.tables import table
from linearize_cli.verification import speed
from linearize_cli.verification.artifact import code, files, fingerprint
from linearize_cli.verification.check import (
    FAIL,
    TIE,
    Finding,
    Line,
    Subject,
    compared,
    no_tree_of,
    not_checked,
)
from linearize_cli.verification.definition import definition
from linearize_cli.verification.drafts import drafts
from linearize_cli.verification.drift import drift
from linearize_cli.verification.forms import forms, padding, reload
from linearize_cli.verification.greedy import greedy
from linearize_cli.verification.long import long
from linearize_cli.verification.prompts import read_prompts, tokenize
from linearize_cli.verification.rollback import rollback
from linearize_cli.verification.rows import rows
from linearize_cli.verification.sampling import sampling
from linearize_cli.verification.speculation import DEFAULT_TREE, Speculation, by_trees, load_drafted
from linearize_cli.verification.tree import tree
from linearize_cli.versions import versions

Check = Callable[[Subject], Finding]
# Checks of an artifact's folder.
SAVED: dict[str, Check] = {"code": code, "files": files, "fingerprint": fingerprint}
READING: dict[str, Check] = {"padding": padding, "reload": reload}
DECODING: dict[str, Check] = {
    "tree": tree,
    "forms": forms,
    "greedy": greedy,
    "rollback": rollback,
    "padding": padding,
    "drift": drift,
}
# Checks that take long: --quick leaves them out.
THOROUGH: dict[str, Check] = {
    "rows": rows,
    "drafts": drafts,
    "definition": definition,
    "long": long,
}
# Checks that are repeated on a copy in fp32 for a model in half precision, where rounding hides faults.
STRICT: dict[str, Check] = {
    "tree": tree,
    "forms": forms,
    "rollback": rollback,
    "padding": padding,
    "rows": rows,
    "definition": definition,
    "long": long,
}
# These measure what only a sound model has.
MEASURING: dict[str, Check] = {"sampling": sampling, "speed": speed.speed}
# What to do where a check of the folder failed.
ADVICE = {
    "code": "To verify the code that the artifact carries, read it and add --trust-remote-code.",
    "files": "Fetch or convert the artifact again; after changes of your own, `linearize seal` records them.",
}
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


@torch.inference_mode()
def verify_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompts: Sequence[str] | None = None,
    max_new: int = 64,
    drafter: Drafter | None = None,
    speculation: Speculation | None = None,
    parents: Sequence[int] | None = None,
    seed: int = 0,
    quick: bool = False,
    artifact: Path | None = None,
    progress: Callable[[str], None] = lambda check: None,
) -> dict[str, Any]:
    """Run every check on a linearized model, in evaluation mode, on its device and in its dtype.

    Args:
        prompts: texts to continue; None: a few built in.
        max_new: tokens to generate for each prompt.
        drafter: of the trees that the model verifies; None: prompt lookup.
        speculation: what greedy decoding is compared with and timed against; None: these trees.
        parents: of the nodes of the tree that is compared with sequential decoding; None: one of 64.
        quick: whether to leave out the checks that take long: long rows, batches of many kinds, layers against their
            definition, sampling at several settings, and in half precision the same in fp32.
        artifact: the folder that the model was loaded from: its code, files and fingerprint are checked as well.
        progress: called with the name of each check before it starts.

    Returns:
        The contents of `verify.json`. `checks` is the table; `failed` names the checks beyond their `limits`; `noise`
        is the measured rounding noise of the logits (`rounding_noise`), and a greedy token that differs is a tie if
        its margin is less than 10 times that; parts that were not run are None. A model that does not decode has pads
        and `reload` (saved and loaded again) checked.

    Raises:
        UserError: the model is not linearized, no prompt has a token, or max_new does not fit its context.
    """
    if not converted(model):
        raise UserError(
            "the model has no converted layer", "`linearize convert MODEL` makes a linearized model."
        )
    task = task_of(model, tokenizer)
    progress("noise")
    texts = tokenize(model, tokenizer, prompts, max_new)
    for ids in texts:
        task.check_tokens(torch.tensor(ids))
    try:
        subject = subject_of(task, model, texts, max_new, seed)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        return report_of([stopped("noise", error)], model, None, seed)
    subject = replace(subject, quick=quick, tokenizer=tokenizer, artifact=artifact)
    if subject.no_tree is None:
        drafter = drafter or Lookup()
        speculation = speculation or by_trees(model, drafter)
        own, target = subject.noise, speculation.target
        if target is not model:
            own, _ = rounding_noise(Decoder(target), subject.rows, target.dtype)
        subject = replace(
            subject,
            drafter=drafter,
            parents=parents or DEFAULT_TREE,
            speculation=speculation,
            target_noise=own,
        )
    found = [noise(subject)]
    checks = (SAVED if artifact else {}) | (DECODING if task.decodes else READING)
    for name, check in (checks | (THOROUGH if task.decodes and not quick else {})).items():
        progress(name)
        found.append(run(name, check, subject))
    if subject.half and task.decodes and not quick:
        found.append(strict(subject, progress))
    failed = failures(found)
    for name, check in MEASURING.items() if task.decodes else ():
        if failed:
            found.append(not_checked(name, "other checks failed"))
            continue
        progress(name)
        found.append(run(name, check, subject))
    if not task.decodes:
        found += [
            not_checked(name, f"{task.kind} writes no text")
            for name in (*DECODING, *MEASURING)
            if name not in READING
        ]
    return report_of(found, model, subject.noise, seed)


def report_of(found: list[Finding], model: PreTrainedModel, noise: float | None, seed: int) -> dict[str, Any]:
    """Return the contents of `verify.json`."""
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


def noise(subject: Subject) -> Finding:
    """Judge the rounding noise: rows together and alone, without a cache, may differ by no more than other forms."""
    limit = TOLERANCE[subject.model.dtype] * max(1.0, subject.largest)
    return compared("noise", subject.noise, limit, {})


def run(name: str, check: Check, subject: Subject) -> Finding:
    """Run a check. A model whose code raises an error in it has failed it."""
    try:
        return check(subject)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        return stopped(name, error)


def stopped(name: str, error: Exception) -> Finding:
    """Return the finding of a check in which the model's code raised an error."""
    return Finding(lines=[Line(name, f"stopped by {type(error).__name__}: {brief(error)}", "", FAIL)])


def strict(subject: Subject, progress: Callable[[str], None]) -> Finding:
    """Repeat the checks of forms on a copy in fp32, whose limits are a thousand times less."""
    wide = in_float32(subject.model)
    if wide is None:
        return not_checked("float32", "memory holds no copy of the model in float32")
    own = subject_of(subject.task, wide, subject.texts, subject.max_new, subject.seed)
    own, found = replace(own, parents=subject.parents), []
    for name, check in STRICT.items():
        progress(f"{name} in float32")
        found.append(run(name, check, own))
    return Finding(
        {"float32": {key: value for finding in found for key, value in finding.data.items()}},
        [replace(line, name=f"{line.name}_float32") for finding in found for line in finding.lines],
        {f"{name}_float32": limit for finding in found for name, limit in finding.limits.items()},
    )


def subject_of(
    task: Task, model: PreTrainedModel, texts: list[list[int]], max_new: int, seed: int
) -> Subject:
    """A model with what all checks need, without speculation.

    Raises:
        UserError: the model's logits are not numbers.
    """
    context = context_length(model)
    size = max(layer.linear_attention.equation.recent for layer in converted(model).values()) or 32
    rows = sample_rows(model, texts, min(4 * size + 37, context), seed)
    if task.decodes:
        read, _, _ = task.start(model, list(rows[:1]))
    else:
        read = lambda ids: torch.stack(task.read(model, list(ids)))  # noqa: E731
    noise, largest = rounding_noise(read, rows, model.dtype)
    no_tree = no_tree_of(task, model)
    return Subject(task, model, texts, rows, size, context, max_new, seed, noise, largest, no_tree=no_tree)


def failures(found: list[Finding]) -> list[str]:
    """The names of the checks that failed, each once."""
    return list(
        dict.fromkeys(line.name for finding in found for line in finding.lines if line.verdict == FAIL)
    )


def verify(
    artifact: str | Path = ".",
    *,
    draft: str | None = None,
    target: str = "self",
    tree: str | None = None,
    prompts: str | Path | None = None,
    max_new: int = 64,
    device: str = "cpu",
    dtype: str | None = None,
    seed: int = 0,
    quick: bool = False,
    trust_remote_code: bool = False,
    progress: Callable[[str], None] = lambda check: None,
    write: bool = True,
) -> dict[str, Any]:
    """`linearize verify`: load an artifact, run every check, write `verify.json` into it.

    Args:
        draft, target, tree: see `speculation.Choice`.
        prompts: a file with a prompt a line, or JSONL with a `text` field; None: a few built in.
        dtype: torch's name of the dtype to run in; None: the artifact's.
        quick: as of `verify_model`.
        trust_remote_code: whether to run the code that the artifact carries, and to verify that. Else this package's
            code is verified, and compared with it.
        write: whether to write ARTIFACT/verify.json.

    Returns:
        As `verify_model`; a verdict of FAIL raises nothing.

    Raises:
        UserError: the folder is no linearized artifact or not whole, or the prompts, the tree or the drafter cannot
            be used.
    """
    folder = user_path(artifact)
    check_artifact(folder)
    if write:
        check_writable(folder / "verify.json")
    texts = None if prompts is None else read_prompts(user_path(prompts))
    options = dict(device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    try:
        model, tokenizer, ways = load_drafted(folder.resolve(), draft, target, tree, options)
    except UserError as error:
        since = changed(read_record(folder).get("checksums") or checksums(folder), folder)
        hint = f"Since the artifact was saved, {since}." if since else ""
        raise UserError(error.what, f"{error.hint}\n{hint}".strip()) from error
    measured = dict(prompts=texts, max_new=max_new, seed=seed, quick=quick, progress=progress)
    report = verify_model(model, tokenizer, artifact=folder, **measured, **ways)
    if write:
        write_json(folder / "verify.json", report)
    return report


def render(report: dict[str, Any]) -> RenderableType:
    """A report of `verify` as a table and sentences."""
    rows = table("check", "measured", "limit", "")
    for line in report["checks"]:
        rows.add_row(line["name"].replace("_", " "), line["measured"], line["limit"], line["verdict"])
    said = speed.sentence(report)
    return Group(rows, "", f"{report['verdict']}: {sentence(report)}", *([said] if said else []))


def sentence(report: dict[str, Any]) -> str:
    """The verdict, in words."""
    if report["verdict"] == FAIL:
        names = ", ".join(name.replace("_", " ") for name in report["failed"])
        advice = [text for name, text in ADVICE.items() if name in report["failed"]]
        return " ".join([f"these checks failed: {names}.", *advice])
    agree = f"all forms of the model agree within the rounding of {report['dtype']}"
    if report["code"] and not report["files"]:
        agree = f"its files could not be compared with what was saved; {agree}"
    greedy = report["greedy"]
    if greedy is None:
        return f"{agree}."
    if report["verdict"] == "EXACT":
        return f"{agree}, and so do all {greedy['tokens']:,} greedy tokens of {greedy['prompts']} prompts."
    return f"{agree}; {greedy['mismatches']} of {greedy['tokens']:,} greedy tokens differ, each where logits tie."
