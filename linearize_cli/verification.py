"""`verify`: whether a linearized model computes the same in every way in which it can be run."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import linearize_cli.runtime  # noqa: F401  lets transformers load artifacts
from linearize_cli.artifact.load import load
from linearize_cli.console import write_json
from linearize_cli.errors import UserError, first_five
from linearize_cli.measure.equivalence import (
    Comparison,
    compare_forms,
    compare_padding,
    compare_reading,
    compare_reload,
    compare_rollback,
    greedy_mismatches,
    rounding_noise,
    sample_rows,
)
from linearize_cli.measure.selfcheck import TOLERANCE
from linearize_cli.recover.read import Chat, read_jsonl
from linearize_cli.render import table
from linearize_cli.runtime.dispatch import converted
from linearize_cli.tasks import Task, context_length, task_of
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
BATCH = 8  # prompts decoded together
TIE = 10  # times the noise


@torch.inference_mode()
def verify_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompts: Sequence[str] | None = None,
    max_new: int = 64,
    seed: int = 0,
    progress: Callable[[str], None] = lambda check: None,
) -> dict[str, Any]:
    """Run every check on a linearized model, in evaluation mode, as it lies on its device in its dtype.

    Args:
        prompts: texts to continue; None: a few built in.
        max_new: tokens to generate for each prompt.
        progress: called with the name of each check before it starts.

    Returns:
        The contents of `verify.json`. `failed` names the checks beyond their `limits`; `noise` is the
        measured rounding noise of the logits (`rounding_noise`), and a greedy token that differs is a tie
        if its margin is less than 10 times that; parts that were not run are None. A model that does not
        decode has pads and `reload` (saved and loaded again) checked.

    Raises:
        UserError: the model is not linearized, no prompt has a token, or max_new does not fit its context.
    """
    if not converted(model):
        raise UserError(
            "the model has no converted layer", "`linearize convert MODEL` makes a linearized model."
        )
    task, context = task_of(model, tokenizer), context_length(model)
    if not 1 <= max_new < context:
        what = f"cannot generate {max_new} tokens: the model's context is {context}"
        raise UserError(what, f"Pass --max-new between 1 and {context - 1}.")
    texts = [
        tokenizer(text, verbose=False)["input_ids"] for text in (PROMPTS if prompts is None else prompts)
    ]
    texts = [ids[: context - max_new] for ids in texts if ids]
    if not texts:
        raise UserError("the tokenizer finds no token in any prompt", "Pass other --prompts.")

    size = max(layer.linear_attention.equation.recent for layer in converted(model).values()) or 32
    rows = sample_rows(model, texts, min(4 * size + 37, context), seed)
    if task.decodes:
        checks, noise = check_decoder(task, model, rows, size, progress)
        progress("greedy")
        parts = [texts[first : first + BATCH] for first in range(0, len(texts), BATCH)]
        mismatches = [
            mismatch
            for number, part in enumerate(parts)
            for mismatch in greedy_mismatches(task, model, part, number * BATCH, max_new)
        ]
    else:
        checks, noise = check_encoder(task, model, rows, size, progress)
        mismatches = []

    failed = [name for name, check in checks.items() if check.failed]
    if not all(mismatch["margin"] < TIE * noise for mismatch in mismatches):
        failed.append("greedy")
    measured = {name: check.diff for name, check in checks.items()}
    greedy = {
        "prompts": len(texts),
        "tokens": len(texts) * max_new,
        "mismatches": len(mismatches),
        "first_divergence": mismatches[0] if mismatches else None,
    }
    return {
        "verdict": "FAIL" if failed else "NUMERICAL_TIE" if mismatches else "EXACT",
        "failed": failed,
        "tree": None,
        "forms": {name: measured.get(name) for name in ("prefill_vs_decode", "chunked_vs_decode")},
        "greedy": greedy if task.decodes else None,
        "rollback": {"max_abs_diff": measured.get("rollback")},
        "padding": {"max_abs_diff": measured["padding"]},
        **({} if task.decodes else {"reload": {"max_abs_diff": measured["reload"]}}),
        "drift": None,
        "acceptance": None,
        "speed": None,
        "limits": {name: check.limit for name, check in checks.items()},
        "noise": noise,
        "dtype": str(model.dtype).removeprefix("torch."),
        "seed": seed,
        "versions": versions(),
    }


def check_decoder(
    task: Task, model: PreTrainedModel, rows: Tensor, size: int, progress: Callable[[str], None]
) -> tuple[dict[str, Comparison], float]:
    """What is compared of a model that continues text, by name, and the noise."""
    decoder, _, _ = task.start(model, list(rows[:1]))
    progress("noise")
    noise, largest = rounding_noise(decoder, rows, model.dtype)
    checks = comparisons(model, largest, "prefill_vs_decode", "chunked_vs_decode", "padding", "rollback")
    progress("forms")
    compare_forms(decoder, rows, size, checks["prefill_vs_decode"], checks["chunked_vs_decode"])
    progress("padding")
    compare_padding(task, model, rows, size, checks["padding"])
    progress("rollback")
    if not compare_rollback(decoder, rows, size, checks["rollback"]):
        del checks["rollback"]
    return checks, noise


def check_encoder(
    task: Task, model: PreTrainedModel, rows: Tensor, size: int, progress: Callable[[str], None]
) -> tuple[dict[str, Comparison], float]:
    """What is compared of a model that only reads text, by name, and the noise."""
    progress("noise")
    noise, largest = rounding_noise(lambda ids: torch.stack(task.read(model, list(ids))), rows, model.dtype)
    checks = comparisons(model, largest, "padding", "reload")
    progress("padding")
    compare_reading(task, model, rows, size, checks["padding"])
    progress("reload")
    compare_reload(task, model, rows, checks["reload"])
    return checks, noise


def comparisons(model: PreTrainedModel, largest: float, *names: str) -> dict[str, Comparison]:
    return {name: Comparison(TOLERANCE[model.dtype], largest) for name in names}


def verify(
    artifact: str | Path = ".",
    *,
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
        prompts: a file with a prompt a line, or JSONL with a `text` field; None: a few built in.
        dtype: torch's name of the dtype to run in; None: the artifact's.
        trust_remote_code: whether a feature map that the artifact brings along may run.
        write: whether to write ARTIFACT/verify.json.

    Returns:
        As `verify_model`; a verdict of FAIL raises nothing.

    Raises:
        UserError: the folder is no linearized artifact or not whole, or the prompts cannot be used.
    """
    folder = Path(artifact).expanduser()
    check_artifact(folder)
    texts = None if prompts is None else read_prompts(Path(prompts).expanduser())
    options = dict(device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    model, tokenizer = load(folder.resolve(), **options)
    report = verify_model(model, tokenizer, prompts=texts, max_new=max_new, seed=seed, progress=progress)
    if write:
        write_json(folder / "verify.json", report)
    return report


def check_artifact(folder: Path) -> None:
    """Refuse what is no folder or no artifact, and say what it is."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder", "Name the folder that `linearize convert` wrote.")
    try:
        config = json.loads((folder / "config.json").read_text())
        if not isinstance(config, dict):
            raise ValueError("it is no JSON object")
    except FileNotFoundError:
        hint = "Name the folder that `linearize convert` wrote."
        raise UserError(f"{folder} is no linearized artifact: it has no config.json", hint) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'} cannot be read: {error}", "Convert again.") from None
    modules = {name.partition(".")[0] for name in config.get("auto_map", {}).values()}
    missing = first_five(f"{name}.py" for name in modules if not (folder / f"{name}.py").exists())
    if missing:
        raise UserError(f"{folder} lacks code that it loads by: {missing}", "Convert again.")
    if "linearize" not in config:
        what = f"{folder} is no linearized artifact: its config.json is that of a {config.get('model_type')} model"
        raise UserError(what, f"Convert it first: linearize convert {folder}")


def read_prompts(path: Path) -> list[str]:
    if not path.is_file():
        raise UserError(f"no such file of prompts: {path}", "Name a file with a prompt a line, or JSONL.")
    if path.suffix == ".jsonl":
        documents = list(read_jsonl(path))
        if any(isinstance(document, Chat) for document in documents):
            raise UserError(f"{path} holds chats, no prompts", 'Write JSONL: {"text": "..."}.')
        texts = ["".join(document) for document in documents]
    else:
        texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise UserError(f"{path} holds no prompt", 'Write a prompt a line, or JSONL: {"text": "..."}.')
    return texts


def render(report: dict[str, Any]) -> RenderableType:
    """A report of `verify` as a table and a sentence."""
    greedy, rows = report["greedy"], table("check", ">measured", ">limit", "")
    names = ("padding", "rollback") if greedy else ("padding", "reload")
    forms = report["forms"] if greedy else {}
    for name, diff in (forms | {name: report[name]["max_abs_diff"] for name in names}).items():
        if diff is None:
            rows.add_row(title(name), "not possible: some layers cannot take tokens back", "", "")
        else:
            word = "FAIL" if name in report["failed"] else "ok"
            rows.add_row(title(name), f"{diff:.1e}", f"{report['limits'][name]:.1e}", word)
    if greedy:
        differing = f"{greedy['mismatches']} of {greedy['tokens']} tokens differ"
        word = "FAIL" if "greedy" in report["failed"] else "tie" if greedy["mismatches"] else "ok"
        rows.add_row("greedy", differing, f"margin {TIE * report['noise']:.1e}", word)
    return Group(rows, "", f"{report['verdict']}: {sentence(report)}")


def title(name: str) -> str:
    return name.replace("_", " ")


def sentence(report: dict[str, Any]) -> str:
    """The verdict, in words."""
    greedy = report["greedy"]
    if report["verdict"] == "FAIL":
        return f"the model's forms do not agree ({', '.join(map(title, report['failed']))})."
    agree = f"all forms of the model agree within the rounding of {report['dtype']}"
    if greedy is None:
        return f"{agree}."
    if report["verdict"] == "EXACT":
        return f"{agree}, and so do all {greedy['tokens']} greedy tokens of {greedy['prompts']} prompts."
    return (
        f"{agree}; {greedy['mismatches']} of {greedy['tokens']} greedy tokens differ, each where logits tie."
    )
