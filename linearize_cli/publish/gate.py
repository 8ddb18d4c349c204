"""Checks before publishing: the artifact loads without this package, and passes `verify`."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from linearize_cli.artifact.fingerprint import TEXT
from linearize_cli.artifact.record import read_record
from linearize_cli.errors import CheckFailed, UserError, first_five
from linearize_cli.inputs import read_object
from linearize_cli.metrics.selfcheck import TOLERANCE
from linearize_cli.models.tasks import CausalLM, auto_class_of
from linearize_cli.runtime.bundle import sources
from linearize_cli.verification.check import FAIL
from linearize_cli.verification.report import sentence
from linearize_cli.verification.verify import verify

ALL_THE_SAME = "Use --no-verify to push without these checks."
SHORT = 2  # the number of sequences of a fingerprint that are compared, the shortest ones
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def check_publishable(
    folder: Path, files: list[str], trust_remote_code: bool, note: Callable[[str], None]
) -> None:
    """Load an artifact in a new process without this package, and run `verify --quick` on it.

    Args:
        folder: a complete artifact.
        files: the relative paths of the files that are published.
        trust_remote_code: allow code in the artifact that is not this package's to run.
        note: called with a line of text before each step.

    Raises:
        UserError: the artifact holds other code than this package's, which may not run.
        CheckFailed: it does not load, gives other results than when it was saved, or fails `verify`.
    """
    other = other_code(folder, files)
    if other and not trust_remote_code:
        raise UserError(
            f"{folder} contains code that is not this package's, which a check would run: {first_five(other)}",
            f"Read it, and add --trust-remote-code if you trust it. {ALL_THE_SAME}",
        )
    note("loading the artifact in a new process, without this package")
    check_loads_alone(folder, files)
    report = verify(
        folder,
        quick=True,
        trust_remote_code=trust_remote_code,
        write=False,
        progress=lambda check: note(f"checking {check}"),
    )
    if report["verdict"] == FAIL:
        raise CheckFailed(
            f"{folder} fails verify: {sentence(report)}",
            f"`linearize verify {folder}` shows what was measured. {ALL_THE_SAME}",
        )


def other_code(folder: Path, files: list[str]) -> list[str]:
    """Return the names of what could run and is not this package's: Python files, and classes that an `auto_map`
    names.

    Args:
        files: the relative paths of the artifact's files.
    """
    ours = sources()
    python = [
        name
        for name in files
        if name.endswith(".py") and (folder / name).read_bytes() != ours.get(name, "").encode()
    ]
    named = [
        target
        for name in files
        if name.endswith(".json")
        for target in auto_map_targets(read_object(folder / name) if "config" in name else {})
        if f"{target.rpartition('.')[0]}.py" not in ours
    ]
    return sorted({*python, *named})


def auto_map_targets(data: Any) -> Iterator[str]:
    """Yield the names of the classes that a config loads, `MODULE.CLASS`."""
    entries = data.get("auto_map") if isinstance(data, dict) else None
    for value in entries.values() if isinstance(entries, dict) else ():
        for target in value if isinstance(value, list) else [value]:
            if target is not None:
                yield str(target)


def check_loads_alone(folder: Path, files: list[str]) -> None:
    """Load the published files of an artifact in a new process by its own code, without this package, and compare
    it with its fingerprint: token ids, and, if it is a causal language model, logits of two short sequences.

    Args:
        files: the relative paths of the files that are published.

    Raises:
        CheckFailed: it does not load, or its results are not the recorded ones.
    """
    record = read_record(folder)
    recorded, pipeline = record.get("fingerprint"), record.get("task") or CausalLM.pipeline
    auto_class = auto_class_of(pipeline)
    if auto_class is None:
        raise CheckFailed(f"{folder}/linearize.json names the unknown task {pipeline}", ALL_THE_SAME)
    request = {"auto_class": auto_class, "text": TEXT, "seed": 0, "sequences": []}
    try:
        if recorded and pipeline == CausalLM.pipeline:
            kept = [{key: own[key] for key in ("length", "tokens")} for own in recorded["sequences"][:SHORT]]
            request |= {"seed": recorded["seed"], "sequences": kept}
        found = alone(folder, files, request)
        fault = difference(recorded, found) if recorded else ""
    except (KeyError, TypeError, ValueError) as error:
        raise CheckFailed(
            f"the fingerprint in {folder}/linearize.json is incomplete: {error!r}", ALL_THE_SAME
        ) from error
    if fault:
        raise CheckFailed(f"{folder}: without this package, {fault}", f"Convert it again. {ALL_THE_SAME}")


def difference(recorded: dict[str, Any], found: dict[str, Any]) -> str:
    """Return how an answer of `stranger` differs from the fingerprint of an artifact, as the end of a sentence. It
    is empty if they agree.
    """
    if found["text"] != recorded["tokenizer"]:
        return "its tokenizer splits a fixed text differently"
    tolerance = TOLERANCE[getattr(torch, found["dtype"])]
    for own, logits in zip(recorded["sequences"], found["logits"], strict=False):
        limit = tolerance * max(1.0, *map(abs, own["logits"]))
        gaps = [abs(a - b) for a, b in zip(logits, own["logits"], strict=True)]
        if not all(gap <= limit for gap in gaps):
            said = f"{max(gaps):.1e}" if all(gap < float("inf") for gap in gaps) else "not a finite number"
            return (
                f"its logits differ from those recorded when it was saved: {said}, and at most {limit:.1e} is "
                "rounding"
            )
    return ""


def alone(folder: Path, files: list[str], request: dict[str, Any]) -> dict[str, Any]:
    """Run `stranger` on a request, in a new process and in an empty folder. It sees the published files alone,
    and neither the Hub, an access token, nor transformers' copies of other artifacts' code.

    Raises:
        CheckFailed: the process failed. The message contains the last line of its error output.
    """
    program = Path(__file__).with_name("stranger.py").read_text()
    environment = {name: value for name, value in os.environ.items() if name not in SECRETS}
    with TemporaryDirectory() as place:
        published, modules, empty = (Path(place, name) for name in ("published", "modules", "empty"))
        for path in (modules, empty):
            path.mkdir()
        for name in files:
            (published / name).parent.mkdir(parents=True, exist_ok=True)
            (published / name).symlink_to((folder / name).resolve())
        environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(modules)}
        done = subprocess.run(
            [sys.executable, "-c", program],  # a file would put this folder's modules in the way
            input=json.dumps({**request, "folder": str(published)}),
            env=environment,
            cwd=empty,
            capture_output=True,
            text=True,
        )
    if done.returncode < 0:
        raise CheckFailed(
            f"{folder}: the process that loads it was ended by signal {-done.returncode}, perhaps for a lack of memory",
            ALL_THE_SAME,
        )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise CheckFailed(
            f"{folder} does not load where this package is not installed: {lines[-1]}",
            f"Convert it again. {ALL_THE_SAME}",
        )
    return json.loads(done.stdout.strip().splitlines()[-1])
