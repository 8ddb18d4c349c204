"""`verify`: whether a linearized model computes the same in every way in which it can be run."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import linearize_cli.runtime  # noqa: F401  lets transformers load artifacts
from linearize_cli.artifact.load import check_artifact
from linearize_cli.console import write_json
from linearize_cli.decoder import Decoder
from linearize_cli.errors import UserError
from linearize_cli.inputs import read_text, user_path
from linearize_cli.measure.equivalence import rounding_noise, sample_rows
from linearize_cli.recover.read import BadRow, BadRows, Chat, read_jsonl
from linearize_cli.render import table
from linearize_cli.runtime.dispatch import converted
from linearize_cli.speculative.drafts import Drafter, Lookup
from linearize_cli.tasks import Task, context_length, task_of
from linearize_cli.verify_checks import speed
from linearize_cli.verify_checks.check import FAIL, TIE, Finding, Subject, no_tree_of, not_checked
from linearize_cli.verify_checks.drift import drift
from linearize_cli.verify_checks.forms import forms, padding, reload
from linearize_cli.verify_checks.greedy import greedy
from linearize_cli.verify_checks.rollback import rollback
from linearize_cli.verify_checks.sampling import sampling
from linearize_cli.verify_checks.speculation import DEFAULT_TREE, Speculation, by_trees, load_drafted
from linearize_cli.verify_checks.tree import tree
from linearize_cli.versions import versions

PROMPTS = (
    "Once upon a time, there was a little girl",
    "The",
    "Water boils when",
    "Tom had a red ball. Sue had a blue kite. One day they met in the park, and Tom asked Sue for her",
    "A list of things to buy: bread, milk, eggs,",
    "The quick brown fox jumps over the lazy dog. The quick brown fox",
    "Dear Sir or Madam, I am writing to ask whether",
    "1, 2, 3, 4,",
)
Check = Callable[[Subject], Finding]
READING: dict[str, Check] = {"padding": padding, "reload": reload}
DECODING: dict[str, Check] = {
    "tree": tree,
    "forms": forms,
    "greedy": greedy,
    "rollback": rollback,
    "padding": padding,
    "drift": drift,
}
# These measure what only a sound model has.
MEASURING: dict[str, Check] = {"sampling": sampling, "speed": speed.speed}
PARTS = {
    "tree": None,
    "forms": {"prefill_vs_decode": None, "chunked_vs_decode": None},
    "greedy": None,
    "rollback": {"max_abs_diff": None},
    "padding": {"max_abs_diff": None},
    "drift": None,
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
    progress: Callable[[str], None] = lambda check: None,
) -> dict[str, Any]:
    """Run every check on a linearized model, in evaluation mode, as it lies on its device in its dtype.

    Args:
        prompts: texts to continue; None: a few built in.
        max_new: tokens to generate for each prompt.
        drafter: of the trees that the model verifies; None: prompt lookup.
        speculation: what greedy decoding is compared with and timed against; None: these trees.
        parents: of the nodes of the tree that is compared with sequential decoding; None: one of 64.
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
    subject = subject_of(task, model, texts, max_new, seed)
    if subject.no_tree is None:
        drafter = drafter or Lookup()
        speculation = speculation or by_trees(model, drafter)
        noise, target = subject.noise, speculation.target
        if target is not model:
            noise, _ = rounding_noise(Decoder(target), subject.rows, target.dtype)
        subject = replace(
            subject,
            drafter=drafter,
            parents=parents or DEFAULT_TREE,
            speculation=speculation,
            target_noise=noise,
        )
    found: list[Finding] = []
    for name, check in (DECODING if task.decodes else READING).items():
        progress(name)
        found.append(check(subject))
    failed = failures(found)
    for name, check in MEASURING.items() if task.decodes else ():
        if failed:
            found.append(not_checked(name, "the forms of the model do not agree"))
            continue
        progress(name)
        found.append(check(subject))
    failed = failures(found)
    if not task.decodes:
        found += [
            not_checked(name, f"{task.kind} writes no text")
            for name in (*DECODING, *MEASURING)
            if name not in READING
        ]
    lines = [line for finding in found for line in finding.lines]
    ties = any(line.verdict == TIE for line in lines)
    return {
        "verdict": FAIL if failed else "NUMERICAL_TIE" if ties else "EXACT",
        "failed": failed,
        **PARTS,
        **{key: value for finding in found for key, value in finding.data.items()},
        "checks": [asdict(line) for line in lines],
        "limits": {name: limit for finding in found for name, limit in finding.limits.items()},
        "noise": subject.noise,
        "dtype": str(model.dtype).removeprefix("torch."),
        "seed": seed,
        "versions": versions(),
    }


def tokenize(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str] | None, max_new: int
) -> list[list[int]]:
    """The tokens of prompts, the last ones cut off where max_new more would not fit the context.

    Raises:
        UserError: no prompt has a token, or max_new does not fit.
    """
    context = context_length(model)
    if not 1 <= max_new < context:
        what = f"cannot generate {max_new} tokens: the model's context is {context}"
        raise UserError(what, f"Pass --max-new between 1 and {context - 1}.")
    texts = [
        tokenizer(text, verbose=False)["input_ids"] for text in (PROMPTS if prompts is None else prompts)
    ]
    texts = [ids[: context - max_new] for ids in texts if ids]
    if not texts:
        raise UserError("the tokenizer finds no token in any prompt", "Pass other --prompts.")
    return texts


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
    trust_remote_code: bool = False,
    progress: Callable[[str], None] = lambda check: None,
    write: bool = True,
) -> dict[str, Any]:
    """`linearize verify`: load an artifact, run every check, write `verify.json` into it.

    Args:
        draft, target, tree: see `speculation.Choice`.
        prompts: a file with a prompt a line, or JSONL with a `text` field; None: a few built in.
        dtype: torch's name of the dtype to run in; None: the artifact's.
        trust_remote_code: whether a feature map that the artifact brings along may run.
        write: whether to write ARTIFACT/verify.json.

    Returns:
        As `verify_model`; a verdict of FAIL raises nothing.

    Raises:
        UserError: the folder is no linearized artifact or not whole, or the prompts, the tree or the drafter cannot
            be used.
    """
    folder = user_path(artifact)
    check_artifact(folder)
    texts = None if prompts is None else read_prompts(user_path(prompts))
    options = dict(device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    model, tokenizer, ways = load_drafted(folder.resolve(), draft, target, tree, options)
    report = verify_model(
        model, tokenizer, prompts=texts, max_new=max_new, seed=seed, progress=progress, **ways
    )
    if write:
        write_json(folder / "verify.json", report)
    return report


def read_prompts(path: Path) -> list[str]:
    if not path.is_file():
        raise UserError(f"no such file of prompts: {path}", "Name a file with a prompt a line, or JSONL.")
    if path.suffix == ".jsonl":
        try:
            documents = list(read_jsonl(path, BadRows()))
        except BadRow as error:
            raise UserError(error.what, "Correct or remove the line.") from None
        if any(isinstance(document, Chat) for document in documents):
            raise UserError(f"{path} holds chats, no prompts", 'Write JSONL: {"text": "..."}.')
        texts = ["".join(document) for document in documents]
    else:
        texts = read_text(path, "Write a prompt a line, in UTF-8.").splitlines()
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise UserError(f"{path} holds no prompt", 'Write a prompt a line, or JSONL: {"text": "..."}.')
    return texts


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
        return f"the model's forms do not agree ({names})."
    agree = f"all forms of the model agree within the rounding of {report['dtype']}"
    greedy = report["greedy"]
    if greedy is None:
        return f"{agree}."
    if report["verdict"] == "EXACT":
        return f"{agree}, and so do all {greedy['tokens']:,} greedy tokens of {greedy['prompts']} prompts."
    return f"{agree}; {greedy['mismatches']} of {greedy['tokens']:,} greedy tokens differ, each where logits tie."
