"""`verify`: checks that a linearized model gives the same results in every mode in which it can run.

The modes are prefill, chunked prefill, decoding, padded batches, token trees, rollback and reloading.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import linearize_cli.runtime  # noqa: F401  lets transformers load artifacts
from linearize_cli.artifact.checksums import changed
from linearize_cli.artifact.fingerprint import in_float32
from linearize_cli.artifact.load import check_artifact
from linearize_cli.artifact.record import read_record, summed
from linearize_cli.errors import UserError
from linearize_cli.files import check_writable, write_json
from linearize_cli.hub import brief
from linearize_cli.inputs import user_path
from linearize_cli.metrics.equivalence import rounding_noise, sample_rows
from linearize_cli.metrics.selfcheck import TOLERANCE
from linearize_cli.models.decoding import Decoder
from linearize_cli.models.positions import context_length
from linearize_cli.models.task import Task
from linearize_cli.models.tasks import task_of
from linearize_cli.runtime.dispatch import converted
from linearize_cli.speculative.drafts import Drafter, Lookup
from linearize_cli.verification.check import (
    FAIL,
    Finding,
    Line,
    Subject,
    compared,
    no_tree_of,
    not_checked,
)
from linearize_cli.verification.checks import DECODING, MEASURING, READING, SAVED, STRICT, THOROUGH, Check
from linearize_cli.verification.prompts import read_prompts, tokenize
from linearize_cli.verification.report import failures, report_of
from linearize_cli.verification.speculation import DEFAULT_TREE, Speculation, by_trees, load_drafted


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
        prompts: texts to continue, or None for the built-in ones.
        max_new: tokens to generate for each prompt.
        drafter: drafts the token trees that the model verifies. None uses prompt lookup.
        speculation: the speculative decoding that is compared with greedy decoding and timed. None verifies
            the drafter's trees with the model itself.
        parents: the parent of each node of the token tree in the check `tree`, -1 for the root. None uses
            Medusa's tree of 64 nodes.
        seed: the seed of all random inputs.
        quick: skip the slow checks: long rows, batches of many kinds, layers against their definition,
            sampling at several settings, and the repetition in float32 of a half-precision model.
        artifact: the folder that the model was loaded from. Its code, files and fingerprint are checked as
            well. None: these are not checked.
        progress: called with the name of each check before it starts.

    Returns:
        The contents of `verify.json`:
            checks: the lines of the table.
            failed: the names of the checks that exceed their limits.
            noise: the measured rounding noise of the logits (`rounding_noise`). A greedy token that differs
                counts as a tie if the two tokens' logits differ by less than 10 times the noise.
        Parts that were not run are None. For an encoder, `padding` and `reload` are the only checks of the
        model.

    Raises:
        UserError: the model is not linearized, no prompt has a token, or max_new does not fit its context.
    """
    if not converted(model):
        raise UserError("the model has no converted layer", "Convert it first: linearize convert MODEL.")
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
            not_checked(name, f"{task.kind} does not generate text")
            for name in (*DECODING, *MEASURING)
            if name not in READING
        ]
    return report_of(found, model, subject.noise, seed)


def noise(subject: Subject) -> Finding:
    """Check that the rounding noise of the logits is within the dtype's tolerance.

    The noise is the difference between the logits of rows in a batch and of the same rows alone, without a
    cache.
    """
    limit = TOLERANCE[subject.model.dtype] * max(1.0, subject.largest)
    return compared("noise", subject.noise, limit, {})


def run(name: str, check: Check, subject: Subject) -> Finding:
    """Run a check and return its finding. If the model's code raises an error, the check fails.

    A UserError, or a lack of GPU memory, ends the command instead.
    """
    try:
        return check(subject)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        return stopped(name, error)


def stopped(name: str, error: Exception) -> Finding:
    """Return the finding of a check that failed because the model's code raised an error."""
    return Finding(lines=[Line(name, f"stopped by {type(error).__name__}: {brief(error)}", "", FAIL)])


def strict(subject: Subject, progress: Callable[[str], None]) -> Finding:
    """Repeat the checks of `STRICT` on a float32 copy of the model, with limits about a thousand times
    smaller.

    If memory does not suffice for the copy, they count as not run.
    """
    wide = in_float32(subject.model)
    if wide is None:
        return not_checked("float32", "not enough memory for a float32 copy of the model")
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
    """Return the model with its test inputs, and measure the rounding noise of its logits. Speculation is not
    set.

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


def verify(
    artifact: str | Path = ".",
    *,
    draft: str | None = None,
    target: str = "self",
    tree: str | None = None,
    prompts: str | Path | None = None,
    max_new: int = 64,
    device: str = "auto",
    dtype: str | None = None,
    seed: int = 0,
    quick: bool = False,
    trust_remote_code: bool = False,
    progress: Callable[[str], None] = lambda check: None,
    write: bool = True,
) -> dict[str, Any]:
    """Load an artifact, run every check, and write `verify.json` into it (`linearize verify`).

    Args:
        artifact: the artifact's folder.
        draft: "medusa", "lookup" or a model. None chooses medusa if the artifact has heads, else lookup.
        target: "self", or "teacher" if the artifact drafts for its softmax teacher.
        tree: the name of a tree, or a JSON file of choices. None uses the heads' own tree for drafts, and
            Medusa's tree of 64 nodes for the check `tree`.
        prompts: a file with one prompt on each line, or JSONL with a `text` field. None uses the built-in
            prompts.
        max_new: tokens to generate for each prompt.
        device: the torch device to run on. `auto` is CUDA if there is one, then MPS, then the CPU.
        dtype: the name of the torch dtype to run in. None uses the artifact's.
        seed: the seed of all random inputs.
        quick: skip the slow checks (long rows, batches of many kinds, and others).
        trust_remote_code: run and verify the artifact's own code. Otherwise this package's code is verified,
            and compared with the artifact's.
        progress: called with the name of each check before it starts.
        write: write ARTIFACT/verify.json.

    Returns:
        The contents of `verify.json` (see `verify_model`). A verdict of FAIL does not raise.

    Raises:
        UserError: the folder is not a complete linearized artifact, or the prompts, the tree or the drafter
            cannot be used.
    """
    folder = user_path(artifact)
    check_artifact(folder)
    if write:
        check_writable(folder / "verify.json")
    texts = None if prompts is None else read_prompts(user_path(prompts))
    # A check of its own compares the checksums.
    options = dict(device=device, dtype=dtype, trust_remote_code=trust_remote_code, checksums=False)
    try:
        model, tokenizer, ways = load_drafted(folder.resolve(), draft, target, tree, options)
    except UserError as error:
        since = changed(read_record(folder), folder)
        hint = f"Since the artifact was saved, {since}." if since else ""
        raise UserError(error.what, f"{error.hint}\n{hint}".strip()) from error
    measured = dict(prompts=texts, max_new=max_new, seed=seed, quick=quick, progress=progress)
    report = summed(verify_model(model, tokenizer, artifact=folder, **measured, **ways))
    if write:
        write_json(folder / "verify.json", report)
    return report
