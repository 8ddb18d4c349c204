"""The folder beside an artifact in which a run works, so that an interrupted run can be resumed."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from linearize_cli.errors import CheckFailed, UserError, first_five
from linearize_cli.files import SUFFIX, cannot_write, write_json
from linearize_cli.training.job import Job

FULL = 1 << 20  # free bytes below which a failure to write is put down to the disk
JOB, CHECKPOINT, NEW, OLD = "job.json", "checkpoint.pt", "artifact", "replaced"
CONTENTS = {
    *(JOB, CHECKPOINT, NEW, OLD, "log.jsonl", "medusa.jsonl", "self.jsonl"),
    *("adapter", "heads", "hidden", "blocks"),
}


class Workspace:
    """The folder of one run. `job.json` in it marks the folder as ours and is deleted last.

    Attributes:
        path: the folder.
        state: the content of `job.json`: the run configuration, and `force`.
        lock: the descriptor that keeps other runs out of the folder while it is open.
    """

    def __init__(self, path: Path):
        self.path, self.state, self.lock = path, {}, None

    def open(self, job: Job, resume: bool, force: bool, artifact: str = "") -> dict[str, Any] | None:
        """Create and lock the folder, or take over the one that an interrupted run left.

        Args:
            artifact: identifies the artifact that the run adds to, if there is one.

        Returns:
            The report of the interrupted run if only the deletion of this folder was left to do, else None.

        Raises:
            UserError: the run cannot start. Nothing has changed.
        """
        before, asked = self.claim(), {**job.to_dict(), "artifact": artifact}
        try:
            self.restore()
            if resume:
                self.require_same(asked, before)
            report = self.finished(before)
            if report is not None and resume:
                self.remove()
                return report
            if report is not None:
                self.clear()
            elif before and not (resume or force):
                raise UserError(
                    f"{self.path} is left of an interrupted run",
                    "Pass --resume to go on, or --force to start over.",
                )
            force = force or bool(resume and before.get("force"))
            self.check(job, force)
            if not resume:
                self.clear()
            self.save_state({**asked, "force": force})
            return None
        except BaseException:
            with suppress(OSError):
                self.path.rmdir()  # fails unless it is empty
            self.release()
            raise

    def claim(self) -> dict[str, Any] | None:
        """Create the folder if there is none, lock it, and return the `job.json` that an interrupted run left.

        Raises:
            UserError: the folder cannot be written, another run has it, or it is not ours.
        """
        if not self.path.parent.is_dir():
            raise UserError(f"there is no folder {self.path.parent}", "Create it, or choose another folder.")
        try:
            self.path.mkdir(exist_ok=True)
            self.lock = os.open(self.path, os.O_RDONLY) if fcntl else None
        except OSError as error:
            what = cannot_write(self.path, error).what
            raise UserError(what, "Choose a folder that exists and that you can write to.") from error
        try:
            self.exclude_others()
            before, names = read_state(self.path / JOB), set(os.listdir(self.path))
            if before is None:
                foreign = names - {JOB + SUFFIX}  # a run may have been killed while it wrote its first file
            else:
                foreign = {name for name in names if name.removesuffix(SUFFIX) not in CONTENTS}
            if foreign or self.path.is_symlink():
                has = f"holds {first_five(foreign)}" if foreign else "is a link"
                raise UserError(
                    f"{self.path} is in the way: it {has}, so no run of linearize made it",
                    "Move it away, or choose another output folder.",
                )
            return before
        except BaseException:
            self.release()
            raise

    def exclude_others(self) -> None:
        """Lock the folder as long as this run has it open.

        Raises:
            UserError: another run has.
        """
        if self.lock is None:
            return
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run works in {self.path}", "Wait until it has ended.") from None
        except OSError:
            pass  # this file system has no locks

    def require_same(self, asked: dict[str, Any], before: dict[str, Any] | None) -> None:
        """Raise UserError unless `before` is the state of an interrupted run with the same configuration."""
        if before is None:
            raise UserError(f"nothing to resume: there is no {self.path}", "Run without --resume.")
        now = json.loads(json.dumps(asked))
        changed = [key for key in now if before.get(key) != now[key]]
        if changed:
            raise UserError(
                f"{self.path} is of a run with another {', '.join(changed)}",
                "Resume with the arguments of that run, or start over with --force.",
            )

    def restore(self) -> None:
        """Put back what an interrupted run moved into the folder."""

    def finished(self, before: dict[str, Any] | None) -> dict[str, Any] | None:
        """Return the report of a run that was killed after it had put its result in place, or None."""
        return before and before.get("report")

    def check(self, job: Job, force: bool) -> None:
        """Raise UserError if the result may not be put where it belongs."""

    def save_state(self, state: dict[str, Any]) -> None:
        """Write `job.json`."""
        self.state = state
        write_json(self.path / JOB, state)

    def clear(self) -> None:
        """Delete the contents: the checkpoint first, so that a kill in between leaves a run that starts anew, and
        `job.json` last.
        """
        self.restore()
        order = {CHECKPOINT: 0, JOB: 2}
        for path in sorted(self.path.iterdir(), key=lambda path: order.get(path.name, 1)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def remove(self) -> None:
        """Delete the folder and let other runs have its name."""
        self.clear()
        self.path.rmdir()
        self.release()

    def release(self) -> None:
        """Unlock the folder."""
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    @contextmanager
    def working(self) -> Iterator[None]:
        """Delete the folder when the run ends. An interrupted run keeps it, and so does one that fails after training.

        Raises:
            KeyboardInterrupt: the run was interrupted; the message says what was kept.
            UserError: the disk is full, or what the run raised; the hint says what was kept.
        """
        try:
            yield
        except KeyboardInterrupt:
            if os.listdir(self.path) == [JOB]:
                self.remove()
                raise
            raise KeyboardInterrupt(f"what was done is kept in {self.path}: go on with --resume") from None
        except CheckFailed:
            self.remove()
            raise
        except Exception as error:
            kept = (self.path / CHECKPOINT).exists()
            with suppress(OSError):
                if kept:
                    shutil.rmtree(self.path / NEW, ignore_errors=True)
                else:
                    self.remove()
            where = f"What was trained is kept in {self.path}: go on with --resume."
            hint = where if kept else "Nothing was kept."
            if disk_is_full(error, self.path.parent):
                raise UserError("the disk is full", f"Free some space. {hint}") from error
            if isinstance(error, UserError) and kept:
                raise UserError(error.what, f"{error.hint}\n{hint}".strip()) from error
            raise
        else:
            with suppress(OSError):  # the result is in place; the next run deletes what is left
                self.remove()
        finally:
            self.release()


def read_state(path: Path) -> dict[str, Any] | None:
    """Return the content of a `job.json`, or None if there is none that a run has written."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) and {"model", "recipe"} <= state.keys() else None


def disk_is_full(error: Exception, folder: Path) -> bool:
    """Return whether an error comes from a full disk: each library says so in its own way, and some only fail."""
    if any(getattr(e, "errno", None) == errno.ENOSPC for e in (error, error.__cause__)):
        return True
    return not isinstance(error, UserError) and shutil.disk_usage(folder).free < FULL
