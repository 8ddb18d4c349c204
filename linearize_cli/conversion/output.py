"""The output folder of a conversion: what may be replaced, and how a new artifact replaces an old one."""

import ctypes
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from linearize_cli.artifact.contents import foreign_files
from linearize_cli.checksums import sha256
from linearize_cli.conversion.workspace import NEW, OLD, Workspace
from linearize_cli.data.names import DEMO, SELF
from linearize_cli.errors import UserError, first_five
from linearize_cli.files import SUFFIX
from linearize_cli.inputs import user_path
from linearize_cli.training.job import Job

ELSEWHERE = "Pass -o DIR to write elsewhere."
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # constants of Linux


def output_folder(name: str | Path) -> Path:
    """Return the folder that `-o` names. A symbolic link is resolved.

    Raises:
        UserError: the path cannot be an artifact's folder (a broken link, or the root).
    """
    folder = user_path(name, ELSEWHERE)
    if folder.is_symlink():
        if not folder.exists():
            target = os.readlink(folder)
            raise UserError(
                f"{folder} is a link to {target}, which does not exist", f"Delete it. {ELSEWHERE}"
            )
        folder = folder.resolve()
    if folder.name in ("", ".."):
        folder = folder.resolve()
    if not folder.name:
        raise UserError(f"{folder} cannot be an artifact's folder", ELSEWHERE)
    return folder


class Output(Workspace):
    """An output folder DIR and its workspace, `DIR.partial`. DIR always holds a complete artifact, or does
    not exist.

    The run writes the new artifact to `DIR.partial/artifact`. If there is an old one, the two folders
    exchange their names, atomically if the system supports it. Otherwise the old artifact is moved to
    `DIR.partial/replaced` between two renames. If the run is killed there, the next run moves it back.

    Args:
        folder: DIR.
    """

    def __init__(self, folder: Path):
        super().__init__(folder.with_name(folder.name + SUFFIX))
        self.folder = folder

    def restore(self) -> None:
        """Move the old artifact back if a run was killed while it replaced the artifact by the new one."""
        if (self.path / OLD).is_dir() and not os.path.lexists(self.folder):
            os.rename(self.path / OLD, self.folder)

    def finished(self, before: dict[str, Any] | None) -> dict[str, Any] | None:
        """Return the report of an interrupted run if its artifact is already in place, else None.

        Args:
            before: the contents of that run's `job.json`, or None.
        """
        made = os.path.isdir(self.folder) and before and before.get("inode") == inode(self.folder)
        return super().finished(before) if made else None

    def check(self, job: Job, force: bool) -> None:
        """Check that DIR may be replaced. It may if it does not exist, or with `force` if it holds only an
        artifact.

        Raises:
            UserError: DIR may not be replaced. The message says what it contains.
        """
        folder = self.folder
        if not os.path.lexists(folder):
            return
        why = reason_to_keep(folder, job)
        if force and why:
            raise UserError(f"{folder} {why}, so --force does not delete it", ELSEWHERE)
        if why:
            raise UserError(f"{folder} already exists. It {why}", ELSEWHERE)
        if not force:
            raise UserError(f"{folder} already exists", f"Pass --force to replace it. {ELSEWHERE}")

    def put_in_place(self, job: Job, report: dict[str, Any]) -> None:
        """Rename the new artifact to DIR. If the run is killed, DIR is either the old or the new artifact.

        Raises:
            UserError: DIR cannot be replaced.
        """
        new = self.path / NEW
        self.check(job, self.state["force"])  # the run may have taken hours
        self.save_state({**self.state, "report": report, "inode": inode(new)})
        try:
            if not os.path.lexists(self.folder):
                os.rename(new, self.folder)
            elif not exchange(new, self.folder):
                self.replace_in_two_steps(new)
        except OSError as error:
            raise UserError(f"cannot replace {self.folder}: {error.strerror}", "Move it away.") from error

    def replace_in_two_steps(self, new: Path) -> None:
        """Move the old artifact away and rename the new folder to DIR. On failure, move the old one back."""
        old = self.path / OLD
        shutil.rmtree(
            old, ignore_errors=True
        )  # left by a run that was killed after its artifact was in place
        os.rename(self.folder, old)
        try:
            os.rename(new, self.folder)
        except BaseException:
            self.restore()
            raise


def reason_to_keep(folder: Path, job: Job) -> str | None:
    """Return the reason why a folder may not be deleted, as a phrase with a verb ("is not a folder").

    Return None if it contains only an artifact and none of the job's inputs.
    """
    if not os.path.isdir(folder):
        return "is not a folder"
    if os.path.ismount(folder):
        return "is a mount point"
    if folder.resolve() in (Path.cwd(), *Path.cwd().parents):
        return "holds the working directory"
    if shares_files(folder, local_path(job.model)):
        return f"holds files of the model {job.model}"
    for source in filter(None, (*job.data, job.eval_data)):
        path = local_path(source)
        if shares_files(folder, path):
            return f"holds data ({source})"
        if path and path.resolve() in folder.resolve().parents:
            return f"is inside the data folder {source}"
    if edited_card(folder):
        return "holds a README.md that was edited"
    if foreign := list(foreign_files(folder)):
        return f"holds files that do not belong to an artifact ({first_five(foreign)})"
    if os.listdir(folder) and not (folder / "linearize.json").is_file():
        return "is not an artifact"
    return None


def edited_card(folder: Path) -> bool:
    """Return True if a user has edited an artifact's model card: its checksum differs from that in
    `linearize.json`.
    """
    try:
        written = json.loads((folder / "linearize.json").read_text(encoding="utf-8")).get("card")
        return written is not None and sha256(folder / "README.md") != written
    except (OSError, ValueError, AttributeError):
        return False


def local_path(name: str) -> Path | None:
    """Return the local path of a model or a text source, or None if nothing local has that name.

    The reserved names `demo` (the embedded teacher) and `self` (text sampled from the model) are never local."""
    path = Path(os.path.expanduser(name))
    return path if name not in (DEMO, SELF) and os.path.exists(path) else None


def shares_files(folder: Path, path: Path | None) -> bool:
    """Return True if deleting a folder would delete a path, or a file that the path links to. False if `path`
    is None.
    """
    if path is None:
        return False
    places = [path, *(file for file in path.glob("*") if file.is_file())]
    inside = {Path(os.path.abspath(path)), *(place.resolve() for place in places)}
    return any(place.is_relative_to(folder.resolve()) for place in inside)


def inode(folder: Path) -> int:
    """Return the inode number of a folder, which stays the same when the folder is renamed."""
    return os.stat(folder).st_ino


def exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders atomically.

    Return False, with nothing changed, if the system cannot do it.
    """
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)  # some C libraries lack it
    names = (AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE)
    return rename is not None and rename(*names) == 0
