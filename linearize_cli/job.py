"""A conversion's order, and the folders it works in: nothing half-written is ever under the final name."""

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from linearize_cli.errors import CheckFailed, UserError
from linearize_cli.recipe import HeadStage, Recipe

FULL = 1 << 20  # free bytes below which a failure to write is put down to the disk


@dataclass(frozen=True)
class Job:
    """What a conversion was asked to do; a resumed one must have been asked the same."""

    model: str
    recipe: Recipe
    data: tuple[str, ...]
    eval_data: str | None
    keep_softmax: str | None
    seq_len: int | None
    batch_size: int | None
    train: bool
    keep_adapter: bool
    dtype: str | None
    seed: int
    medusa_heads: int = 0
    medusa_lr: float | str = HeadStage.lr
    skip_bad_rows: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "recipe": self.recipe.to_dict(), "data": list(self.data)}


def check_output(folder: Path, partial: Path, job: Job, resume: bool, force: bool) -> None:
    if folder.exists() and not force:
        raise UserError(
            f"{folder} exists already", "Pass --force to replace it, or -o DIR to write elsewhere."
        )
    if folder.exists() and not (folder / "linearize.json").exists():
        raise UserError(
            f"{folder} is no artifact, so --force does not delete it", "Pass -o DIR to write elsewhere."
        )
    if not folder.parent.is_dir():
        raise UserError(f"{folder.parent} is no folder", "Create it, or pass -o DIR in one that exists.")
    check_partial(partial, job, resume, force)


def check_partial(partial: Path, job: Job, resume: bool, force: bool) -> None:
    """What an interrupted run left is gone on with, or deleted, only on request.

    Raises:
        UserError: there is none, one of another job, or one that nothing was said about.
    """
    if resume and force:
        raise UserError("--resume goes on with a run, --force starts over", "Pass one of them.")
    if resume:
        if not (partial / "job.json").exists():
            raise UserError(f"nothing to resume: there is no {partial}", "Run without --resume.")
        before, now = json.loads((partial / "job.json").read_text()), json.loads(json.dumps(job.to_dict()))
        changed = [key for key in now if before.get(key) != now[key]]
        if changed:
            raise UserError(
                f"{partial} is of a run with another {', '.join(changed)}",
                "Resume with the arguments of that run, or start over with --force.",
            )
    elif partial.exists():
        if not force:
            raise UserError(
                f"{partial} is left of an interrupted run, or of one that still goes on",
                "Pass --resume to go on, or --force to start over.",
            )
        shutil.rmtree(partial)


def check_space(folder: Path, model: PreTrainedModel, hidden_states: int = 0) -> None:
    """
    Args:
        hidden_states: bytes of those that wait between two blocks of layers.

    Raises:
        UserError: the disk is too full for the artifact and for what training keeps meanwhile.
    """
    need = 2 * sum(p.nbytes for p in model.parameters()) + hidden_states + (64 << 20)
    free = shutil.disk_usage(folder.parent).free
    if free < need:
        part = (
            f" ({hidden_states >> 20} MB of them for hidden states between blocks)" if hidden_states else ""
        )
        raise UserError(
            f"not enough disk space at {folder.parent.resolve().name or folder.parent}: "
            f"{free >> 20} MB are free, about {need >> 20} MB are needed{part}",
            "Free some space, or pass -o DIR on another disk.",
        )


@contextmanager
def partial_folder(partial: Path, job: Job, resume: bool) -> Iterator[None]:
    """`DIR.partial` while the run goes on. An interruption keeps it; a refusal or an early error does not; a
    later one keeps what was trained, if anything was.
    """
    try:
        partial.mkdir(exist_ok=resume)
        (partial / "job.json").write_text(json.dumps(job.to_dict(), indent=2) + "\n")
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"what was done is kept in {partial}: go on with --resume") from None
    except CheckFailed:
        shutil.rmtree(partial)
        raise
    except Exception as error:
        # Each library says it in its own way that the disk is full; some only fail to write.
        full = getattr(error, "errno", None) == errno.ENOSPC or shutil.disk_usage(partial.parent).free < FULL
        kept = (partial / "checkpoint.pt").exists()
        shutil.rmtree(partial / "artifact" if kept else partial, ignore_errors=True)
        hint = f"What was trained is kept in {partial}: go on with --resume." if kept else "Nothing was kept."
        if full:
            raise UserError("the disk is full", f"Free some space. {hint}") from error
        if isinstance(error, UserError) and kept:
            raise UserError(error.what, f"{error.hint}\n{hint}".strip()) from error
        raise
