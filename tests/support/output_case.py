"""A script that kills conversions before one file operation after another, and runs them again.

Its arguments are an empty folder, and the operations before which real conversions are killed. Without those, all
operations on the folders are tried, of a conversion that computes nothing.
"""

import json
import os
import shutil
import signal
import sys
import traceback
from itertools import count
from pathlib import Path

from linearize_cli.conversion import output as output_module
from linearize_cli.conversion.output import Output
from linearize_cli.conversion.workspace import Workspace
from linearize_cli.errors import UserError
from linearize_cli.files import write_text
from linearize_cli.methods.recipe import Recipe
from linearize_cli.training.job import Job

OPERATIONS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "exchange")
JOB = Job("demo", Recipe(name="augmented"), (), None, None, None, None, False, False, None, 0)


def killed_at(moment, work):
    """Run `work` in a child that is killed before its file operation number `moment`.

    Returns:
        Whether it was: it may have fewer.
    """
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL), f"the run failed before operation {moment}"
        return status == signal.SIGKILL
    try:
        operations = 0

        def hook(event, arguments):
            nonlocal operations
            if event in OPERATIONS:
                operations += 1
                if operations == moment:
                    os.kill(os.getpid(), signal.SIGKILL)

        def exchange(*folders, exchange=output_module.exchange):
            hook("exchange", folders)
            return exchange(*folders)

        output_module.exchange = exchange
        sys.addaudithook(hook)
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def write_artifact(folder, text):
    """Write a few files of an artifact that holds `text`."""
    (folder / "adapter").mkdir(parents=True)
    for name in ("linearize.json", "config.json", "model.safetensors", "adapter/adapter_config.json"):
        (folder / name).write_text(text)


def text_of(folder):
    """Return what an artifact holds: None where there is none, or a part of one."""
    texts = {path.read_text() for path in folder.rglob("*") if path.is_file()}
    files = sum(path.is_file() for path in folder.rglob("*"))
    return texts.pop() if len(texts) == 1 and files == 4 else None


def convert(folder, resume=False, force=False):
    """Do with the folders what a conversion does."""
    output = Output(folder)
    report = output.open(JOB, resume, force)
    if report is None:
        with output.working():
            write_text(output.path / "checkpoint.pt", "trained")
            shutil.rmtree(output.path / "artifact", ignore_errors=True)
            write_artifact(output.path / "artifact", "new")
            report = {"made": "new"}
            output.put_in_place(JOB, report)
    assert report == {"made": "new"}


def heads(folder, resume=False, force=False):
    """Do with the folders what the training of heads does, which adds files to an artifact."""
    workspace = Workspace(folder.with_name("out.heads.partial"))
    if workspace.open(JOB, resume, force) is None:
        with workspace.working():
            write_text(workspace.path / "checkpoint.pt", "trained")
            write_text(folder / "medusa.safetensors", "new")
            write_text(folder / "linearize.json", "new")
            workspace.save_state({**workspace.state, "report": {"heads": 4}})


def heads_of(folder):
    """Return what an artifact's report holds."""
    assert (folder / "model.safetensors").read_text() == "old"
    return (folder / "linearize.json").read_text()


def next_run(convert, folder, flag):
    """Run again as a user would who follows what the errors say."""
    try:
        return convert(folder, **({flag: True} if flag else {}))
    except UserError as error:
        assert flag != "force", error
    try:
        convert(folder, resume=True)
    except UserError:
        convert(folder, force=True)


def kill_everywhere(convert, text_of, base, old, flag, moments=None):
    """Kill a conversion before its file operations; each time DIR must be whole, and the next run complete it.

    Args:
        convert: the conversion, of a folder.
        text_of: tells from a folder which artifact it is.
        old: a folder with what DIR holds before, if anything.
        flag: that of the next run.
        moments: before which operations; all if not given.

    Returns:
        How often the old artifact was between two renames.
    """
    between, folder, before = 0, base / "out", text_of(old) if old else None
    for moment in moments or count(1):
        shutil.rmtree(base, ignore_errors=True)
        base.mkdir()
        if old:
            shutil.copytree(old, folder)
        if not killed_at(moment, lambda: convert(folder, force=bool(old))):
            assert moment > 8
            break
        if folder.exists():
            assert text_of(folder) in (before, "new"), moment
        elif old:
            between += 1
            assert text_of(base / "out.partial" / "replaced") == before, moment
        next_run(convert, folder, flag)
        assert text_of(folder) == "new" and os.listdir(base) == ["out"], moment
    return between


def every_case(base):
    """Kill what a conversion does with its folders, before each operation, with both ways of replacing."""
    write_artifact(base / "old", "old")
    common = (convert, text_of, base / "work")
    for flag in (None, "resume", "force"):
        kill_everywhere(*common, None, flag)
        assert kill_everywhere(*common, base / "old", flag) == 0
    assert kill_everywhere(heads, heads_of, base / "work", base / "old", "resume") == 0
    output_module.exchange = lambda *folders: False
    for flag in (None, "resume", "force"):
        assert kill_everywhere(*common, base / "old", flag) == 1


def real_case(base, moments):
    """Kill real conversions: those that replace an artifact, whose layers were linear, by one with a softmax layer."""
    import torch
    from convert_case import make_teacher, run

    from linearize_cli import load
    from linearize_cli.runtime.dispatch import converted

    torch.set_num_threads(1)
    teacher = make_teacher(base)

    def convert(folder, **flags):
        run(teacher, folder, tokens=16 * 4 * 4, keep_softmax="at:1", **flags)

    def kind(folder):
        """Return the number of softmax layers if the folder holds all that an artifact has."""
        names = {path.name for path in folder.iterdir()}
        model, _ = load(folder)
        softmax = json.loads((folder / "linearize.json").read_text())["layers"]["softmax"]
        return ("new" if softmax else "old") if names == whole and converted(model) else None

    run(teacher, base / "old", train=False)
    whole = {path.name for path in (base / "old").iterdir()}
    assert kill_everywhere(convert, kind, base / "work", base / "old", "resume", moments) == 0


if __name__ == "__main__":
    os.fsync = lambda descriptor: None  # a kill loses nothing that was written
    if len(sys.argv) == 2:
        every_case(Path(sys.argv[1]))
    else:
        real_case(Path(sys.argv[1]), list(map(int, sys.argv[2:])))
