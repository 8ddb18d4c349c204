"""The working folder of a run, next to its artifact, from which an interrupted run can be resumed."""

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

FULL = 1 << 20  # free bytes below which a failed write is attributed to a full disk
JOB, CHECKPOINT, NEW, OLD = "job.json", "checkpoint.pt", "artifact", "replaced"
CONTENTS = {
    *(JOB, CHECKPOINT, NEW, OLD, "log.jsonl", "medusa.jsonl", "self.jsonl"),
    *("adapter", "heads", "hidden", "blocks"),
}


class Workspace:
    """The working folder of one run. Its file `job.json` marks it as made by linearize and is deleted last.

    Attributes:
        path: the folder.
        state: the contents of `job.json`: the run configuration, and `force`.
        lock: the open file descriptor that locks out other runs.
    """

    def __init__(self, path: Path):
        self.path, self.state, self.lock = path, {}, None

    def open(self, job: Job, resume: bool, force: bool, artifact: str = "") -> dict[str, Any] | None:
        """Create and lock the folder, or take over the folder of an interrupted run.

        Args:
            job: the run configuration.
            resume: continue the interrupted run.
            force: delete the interrupted run's files, and replace an existing result.
            artifact: identifies the artifact that the run adds to. Empty if it makes a new one.

        Returns:
            the report of the interrupted run if that run had finished all its work, and only this folder was
            left. None in all other cases: the run must be done.

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
                    f"{self.path} was left by an interrupted run",
                    "Pass --resume to continue it, or --force to start over.",
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
        """Create the folder if it does not exist, and lock it.

        Returns:
            the `job.json` of an interrupted run, or None if there was none.

        Raises:
            UserError: the folder cannot be written, is used by another run, or was not made by linearize.
        """
        if not self.path.parent.is_dir():
            raise UserError(
                f"the folder {self.path.parent} does not exist", "Create it, or choose another folder."
            )
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
        """Lock the folder until this run ends. A file system without locks is not an error.

        Raises:
            UserError: another run has locked the folder.
        """
        if self.lock is None:
            return
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is using {self.path}", "Wait until it ends.") from None
        except OSError:
            pass  # this file system has no locks

    def require_same(self, asked: dict[str, Any], before: dict[str, Any] | None) -> None:
        """Check that an interrupted run had the same configuration.

        Args:
            asked: the configuration of this run.
            before: the `job.json` of the interrupted run, or None.

        Raises:
            UserError: it had another configuration, or there is no interrupted run.
        """
        if before is None:
            raise UserError(f"nothing to resume: {self.path} does not exist", "Run without --resume.")
        now = json.loads(json.dumps(asked))
        changed = [key for key in now if before.get(key) != now[key]]
        if changed:
            raise UserError(
                f"{self.path} belongs to a run with different values of {', '.join(changed)}",
                "Resume with the arguments of that run, or start over with --force.",
            )

    def restore(self) -> None:
        """Move files back that an interrupted run moved into the folder. The base class has none; `Output`
        overrides this.
        """

    def finished(self, before: dict[str, Any] | None) -> dict[str, Any] | None:
        """Return the report of an interrupted run if its result was already in place, else None.

        Args:
            before: the contents of that run's `job.json`, or None.
        """
        return before and before.get("report")

    def check(self, job: Job, force: bool) -> None:
        """Check that the result may be put in place. The base class allows it always; `Output` overrides
        this.

        Raises:
            UserError: the result may not be put in place.
        """

    def save_state(self, state: dict[str, Any]) -> None:
        """Write the state to `job.json`."""
        self.state = state
        write_json(self.path / JOB, state)

    def clear(self) -> None:
        """Delete the contents: the checkpoint first, and `job.json` last.

        A run that is killed in between then leaves a folder from which the next run starts anew.
        """
        self.restore()
        order = {CHECKPOINT: 0, JOB: 2}
        for path in sorted(self.path.iterdir(), key=lambda path: order.get(path.name, 1)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def remove(self) -> None:
        """Delete the folder and unlock it."""
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
        """Delete the folder when the context ends. Keep it for a resume if the code inside was interrupted,
        or failed when a checkpoint exists.

        Raises:
            KeyboardInterrupt: the run was interrupted. The message says what was kept.
            UserError: the disk is full, or the code inside raised it. The hint says what was kept.
        """
        try:
            yield
        except KeyboardInterrupt:
            if os.listdir(self.path) == [JOB]:
                self.remove()
                raise
            raise KeyboardInterrupt(f"the progress is kept in {self.path}: continue with --resume") from None
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
            where = f"The progress is kept in {self.path}: continue with --resume."
            hint = where if kept else "Nothing was kept."
            if disk_is_full(error, self.path.parent):
                raise UserError("the disk is full", f"Free some space. {hint}") from error
            if isinstance(error, UserError) and kept:
                raise UserError(error.what, f"{error.hint}\n{hint}".strip()) from error
            raise
        else:
            with suppress(OSError):  # the result is in place, and the next run deletes the rest
                self.remove()
        finally:
            self.release()


def read_state(path: Path) -> dict[str, Any] | None:
    """Return the contents of a `job.json`, or None if it does not exist or was not written by a run of
    linearize.
    """
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) and {"model", "recipe"} <= state.keys() else None


def disk_is_full(error: Exception, folder: Path) -> bool:
    """Return True if an error comes from a full disk.

    Libraries report it in different ways, so any error except a UserError counts if the disk is almost full.
    """
    if any(getattr(e, "errno", None) == errno.ENOSPC for e in (error, error.__cause__)):
        return True
    return not isinstance(error, UserError) and shutil.disk_usage(folder).free < FULL
