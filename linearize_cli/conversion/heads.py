"""`heads`: train Medusa heads for an artifact."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from linearize_cli.artifact.card import card
from linearize_cli.artifact.card_measured import measured
from linearize_cli.artifact.checksums import check_unchanged
from linearize_cli.artifact.load import load
from linearize_cli.artifact.record import read_record, write_record
from linearize_cli.checksums import sha256
from linearize_cli.conversion.preflight import check_budget, check_length, with_batch_size
from linearize_cli.conversion.workspace import Workspace
from linearize_cli.data.names import DEMO
from linearize_cli.demo import heldout_path
from linearize_cli.errors import UserError
from linearize_cli.files import check_writable, replacing, write_text
from linearize_cli.inputs import read_yaml, user_path
from linearize_cli.methods.recipe import Recipe
from linearize_cli.models.device import AUTO, chosen_device
from linearize_cli.models.tasks import task_of
from linearize_cli.speculative.medusa import FILE, MedusaHeads, check_heads
from linearize_cli.terminal import Terminal
from linearize_cli.training.checkpoint import Session
from linearize_cli.training.engine import Engine
from linearize_cli.training.job import EVAL_TOKENS, Job
from linearize_cli.training.medusa import LOG, train_heads
from linearize_cli.training.text import NamedText

HEADS = 4


def heads(
    artifact: str | Path = ".",
    *,
    heads: int = HEADS,
    data: tuple[str, ...] = (),
    eval_data: str | None = None,
    skip_bad_rows: int = 0,
    tokens: int | None = None,
    seq_len: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    resume: bool = False,
    force: bool = False,
    trust_remote_code: bool = False,
    device: str = "auto",
    dtype: str | None = None,
    seed: int = 0,
    terminal: Terminal | None = None,
) -> dict[str, Any] | None:
    """Train Medusa heads for an artifact and save them in its folder. The model's weights do not change.

    The arguments are those of `linearize heads`. Text, tokens and block length default to the conversion's.

    Returns:
        the facts under `medusa` in `linearize.json`, and `output`. Only the main process of a distributed run
            returns them. The others return None.

    Raises:
        UserError: the caller can correct the error. No incomplete heads are left.
        KeyboardInterrupt: `<artifact>.heads.partial` is kept for `resume`.
    """
    folder = user_path(artifact).resolve()
    if not (folder / "linearize.json").is_file():
        raise UserError(
            f"{artifact} is not the folder of an artifact", "Pass the folder that `linearize convert` wrote."
        )
    if (folder / FILE).exists() and not (force or resume):
        raise UserError(f"{artifact} already has heads", "Pass --force to replace them.")
    report = read_record(folder, whole=True)
    check_unchanged(folder, str(folder), besides=FILE)  # the heads are what it makes
    recipe = saved_recipe(folder).with_budget(tokens)
    if report["base_model"] == DEMO:
        data, eval_data = data or (DEMO,), eval_data or (None if data else str(heldout_path()))
    data = data or tuple(recipe.recover.data.split(", "))
    length = seq_len or report.get("seq_len")
    dtype = None if dtype == AUTO else dtype
    asked = (recipe, data, eval_data, None, length, batch_size, True, False, dtype, seed, (), EVAL_TOKENS)
    job = Job(str(folder), *asked, heads, "auto" if lr is None else lr, skip_bad_rows)
    engine = Engine(chosen_device(device))
    terminal = terminal if terminal and engine.main else Terminal(quiet=True)
    workspace = Workspace(folder.with_name(f"{folder.name}.heads.partial"))
    with engine.together():
        engine.on_main(check_writable, folder / FILE)
        facts = engine.on_main(workspace.open, job, resume, force, identity(report))
        if facts is None:
            with engine.only_main(workspace.working), engine.watched():
                made, dtype, facts = train(job, workspace.path, engine, terminal, trust_remote_code)
                if engine.main:
                    made.save(folder, dtype)
                    with replacing(folder / LOG) as temporary:
                        shutil.copy(workspace.path / LOG, temporary)
                    record_heads(folder, report, facts)
                    workspace.save_state({**workspace.state, "report": facts})
    return {**facts, "output": str(artifact)} if engine.main else None


def train(
    job: Job, partial: Path, engine: Engine, terminal: Terminal, trust_remote_code: bool
) -> tuple[MedusaHeads, torch.dtype, dict[str, Any]]:
    """Train heads for the artifact that a job names.

    Args:
        job: the run configuration. Its `model` is the artifact's folder.
        partial: the folder of the checkpoint and the log.

    Returns:
        the heads, the model's dtype, and the facts about the heads for `linearize.json`.
    """
    text = NamedText(job)
    model, tokenizer = load(
        job.model,
        device=engine.home,
        dtype=job.dtype,
        trust_remote_code=trust_remote_code,
        checksums=False,  # `heads` has compared them
    )
    task = task_of(model, tokenizer)
    check_heads(model, type(task))
    text.read_through(tokenizer, task, terminal)
    length = check_length(job.seq_len, job.recipe, model)
    job = with_batch_size(job, length)
    check_budget(job, length, engine.processes)
    text.write_own(model, tokenizer, partial / "self.jsonl", length, terminal, engine)
    blocks = text.blocks(job, tokenizer, task, length, terminal)
    heads, facts = train_heads(job, model, blocks, Session.open(engine, terminal, partial, LOG))
    text.bad.report(terminal)
    return heads, model.dtype, facts


def identity(report: dict[str, Any]) -> str:
    """Return a hash of an artifact's `linearize.json`. It stays the same when heads are added or replaced."""
    rest = {key: value for key, value in report.items() if key not in ("medusa", "checksums", "card")}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def saved_recipe(folder: Path) -> Recipe:
    """Return the recipe of an artifact. It may name parts that the installed version does not have.

    Raises:
        UserError: `recipe.yaml` cannot be read, or is not valid.
    """
    path, hint = folder / "recipe.yaml", "Convert the model again, or download the artifact again."
    data = read_yaml(path, hint)
    if faults := Recipe.faults(data):
        raise UserError(f"{path} cannot be read: {'; '.join(faults)}", hint)
    return Recipe.model_validate(data)


def record_heads(folder: Path, report: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write the facts about new heads into `linearize.json`, and into the model card unless a user edited the
    card.

    Args:
        report: the contents of `linearize.json` before.
        facts: the facts about the heads, for the key `medusa`.
    """
    path, name = folder / "README.md", {"repo_name": folder.name, "recipe": saved_recipe(folder).to_dict()}
    name["measured"] = measured(folder)
    before, report = card(report, **name), {**report, "medusa": facts}
    new = card(report, **name)
    # A killed run may have written the new card already. Bytes, because a user's own text may not be UTF-8.
    untouched = path.is_file() and path.read_bytes() in (before.encode(), new.encode())
    if report.get("checksums"):
        report["checksums"] = {**report["checksums"], FILE: sha256(folder / FILE)}
    if untouched:  # before linearize.json, so that a resumed run can do this again
        write_text(path, new)
        report["card"] = sha256(path)
    write_record(folder, report)
