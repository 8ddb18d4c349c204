"""The output folder of a conversion: what may be replaced, and how the new artifact takes the place of the old."""

import ctypes
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from linearize_cli.artifact.checksums import sha256
from linearize_cli.artifact.contents import foreign_files
from linearize_cli.conversion.workspace import NEW, OLD, Workspace
from linearize_cli.data.names import DEMO, SELF
from linearize_cli.errors import UserError, first_five
from linearize_cli.files import SUFFIX
from linearize_cli.inputs import user_path
from linearize_cli.training.job import Job

ELSEWHERE = "Pass -o DIR to write elsewhere."
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux


def output_folder(name: str | Path) -> Path:
    """Return the folder that `-o` names; of a symbolic link, the folder behind it.

    Raises:
        UserError: it cannot name an artifact.
    """
    folder = user_path(name, ELSEWHERE)
    if folder.is_symlink():
        if not folder.exists():
            target = os.readlink(folder)
            raise UserError(f"{folder} is a link to {target}, which is not there", f"Delete it. {ELSEWHERE}")
        folder = folder.resolve()
    if folder.name in ("", ".."):
        folder = folder.resolve()
    if not folder.name:
        raise UserError(f"{folder} cannot be an artifact's folder", ELSEWHERE)
    return folder


class Output(Workspace):
    """An output folder DIR and its workspace, `DIR.partial`. DIR always holds a whole artifact, or nothing.

    The run writes the new artifact to `DIR.partial/artifact`. If there is an old one, the two folders exchange
    their names, in one step where the system can; else the old one waits in `DIR.partial/replaced` between two
    renames, and the next run puts it back if this one is killed there.
    """

    def __init__(self, folder: Path):
        super().__init__(folder.with_name(folder.name + SUFFIX))
        self.folder = folder

    def restore(self) -> None:
        """Put the old artifact back if a run was killed between the two renames."""
        if (self.path / OLD).is_dir() and not os.path.lexists(self.folder):
            os.rename(self.path / OLD, self.folder)

    def finished(self, before: dict[str, Any] | None) -> dict[str, Any] | None:
        """Return the report of an interrupted run whose artifact is DIR already."""
        made = os.path.isdir(self.folder) and before and before.get("inode") == inode(self.folder)
        return super().finished(before) if made else None

    def check(self, job: Job, force: bool) -> None:
        """Refuse to replace DIR, unless `force` allows it and DIR holds nothing but an artifact.

        Raises:
            UserError: what is in the way.
        """
        folder = self.folder
        if not os.path.lexists(folder):
            return
        if not force:
            raise UserError(f"{folder} exists already", f"Pass --force to replace it. {ELSEWHERE}")
        if why := precious(folder, job):
            raise UserError(f"{folder} {why}, so --force does not delete it", ELSEWHERE)

    def put_in_place(self, job: Job, report: dict[str, Any]) -> None:
        """Give the new artifact the name DIR. A kill leaves the old one or the new one there.

        Raises:
            UserError: what is in the way of it.
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
        """Give a folder the name DIR, and put the old one back if that fails."""
        old = self.path / OLD
        shutil.rmtree(old, ignore_errors=True)  # of a killed run that had put its artifact in place
        os.rename(self.folder, old)
        try:
            os.rename(new, self.folder)
        except BaseException:
            self.restore()
            raise


def precious(folder: Path, job: Job) -> str | None:
    """Return why a folder may not be deleted, as a verb with its object, or None if it is only an artifact."""
    if not os.path.isdir(folder):
        return "is no folder"
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
            return f"lies in the data folder {source}"
    if edited_card(folder):
        return "holds a README.md that was edited"
    if foreign := list(foreign_files(folder)):
        return f"holds files that belong to no artifact ({first_five(foreign)})"
    if os.listdir(folder) and not (folder / "linearize.json").is_file():
        return "is no artifact"
    return None


def edited_card(folder: Path) -> bool:
    """Return whether an artifact's card is another than the one that was written, as `linearize.json` has its sum."""
    try:
        written = json.loads((folder / "linearize.json").read_text(encoding="utf-8")).get("card")
        return written is not None and sha256(folder / "README.md") != written
    except (OSError, ValueError, AttributeError):
        return False


def local_path(name: str) -> Path | None:
    """Return the local path of a model or a source of text, or None if it is not on this machine."""
    path = Path(os.path.expanduser(name))
    return path if name not in (DEMO, SELF) and os.path.exists(path) else None


def shares_files(folder: Path, path: Path | None) -> bool:
    """Return whether a folder holds a file or folder, or a file that the latter links to."""
    if path is None:
        return False
    places = [path, *(file for file in path.glob("*") if file.is_file())]
    inside = {Path(os.path.abspath(path)), *(place.resolve() for place in places)}
    return any(place.is_relative_to(folder.resolve()) for place in inside)


def inode(folder: Path) -> int:
    """Return the inode number of a folder, which stays the same when the folder is renamed."""
    return os.stat(folder).st_ino


def exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step. Return False, with nothing changed, if the system cannot."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)  # not in every C library
    names = (AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE)
    return rename is not None and rename(*names) == 0
