"""What an artifact must pass before it is published: it loads without this package, and `verify` finds nothing."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from linearize_cli.artifact.fingerprint import TEXT
from linearize_cli.artifact.record import read_config, read_record
from linearize_cli.errors import CheckFailed, UserError, first_five
from linearize_cli.metrics.selfcheck import TOLERANCE
from linearize_cli.models.tasks import TASKS, CausalLM
from linearize_cli.runtime.bundle import sources
from linearize_cli.verification.check import FAIL
from linearize_cli.verification.report import sentence
from linearize_cli.verification.verify import verify

ALL_THE_SAME = "--no-verify pushes it all the same."
SHORT = 2  # the number of sequences of a fingerprint that are compared, the shortest ones


def check_publishable(folder: Path, trust_remote_code: bool, note: Callable[[str], None]) -> None:
    """Load an artifact in a new process without this package, and run `verify --quick` on it.

    Args:
        folder: a complete artifact.
        trust_remote_code: allow code in the artifact that is not this package's to run.
        note: called with a line of text before each step.

    Raises:
        UserError: the artifact holds other code than this package's, which may not run.
        CheckFailed: it does not load, gives other results than when it was saved, or fails `verify`.
    """
    other = other_code(folder)
    if other and not trust_remote_code:
        raise UserError(
            f"{folder} contains code that is not this package's, which a check would run: {first_five(other)}",
            f"Read it, and add --trust-remote-code if you trust it. {ALL_THE_SAME}",
        )
    note("loading the artifact in a new process, without this package")
    check_loads_alone(folder)
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


def other_code(folder: Path) -> list[str]:
    """Return the names of an artifact's Python files that are not those of this package."""
    ours = sources()
    return sorted(file.name for file in folder.glob("*.py") if file.read_bytes() != encoded(ours, file.name))


def encoded(texts: dict[str, str], name: str) -> bytes | None:
    """Return the text of a file as bytes, or None if there is none."""
    return texts[name].encode() if name in texts else None


def check_loads_alone(folder: Path) -> None:
    """Load an artifact in a new process by its own code, without this package, and compare it with its
    fingerprint: token ids, and, if it is a causal language model, logits of two short sequences.

    Raises:
        CheckFailed: it does not load, or its results are not the recorded ones.
    """
    record = read_record(folder)
    recorded, pipeline = record.get("fingerprint") or {}, record.get("task") or CausalLM.pipeline
    sequences = recorded.get("sequences", [])[:SHORT] if pipeline == CausalLM.pipeline else []
    auto_class = next(name for name, task in TASKS.items() if task.pipeline == pipeline)
    request = {
        "folder": str(folder.resolve()),
        "auto_class": auto_class,
        "text": TEXT,
        "seed": recorded.get("seed", 0),
        "sequences": [{key: own[key] for key in ("length", "tokens")} for own in sequences],
    }
    found = alone(folder, request)
    if recorded and found["text"] != recorded["tokenizer"]:
        raise CheckFailed(
            f"{folder}: without this package, its tokenizer splits a fixed text differently", ALL_THE_SAME
        )
    dtype = getattr(torch, str(read_config(folder).get("dtype")), torch.float32)
    for own, logits in zip(sequences, found["logits"], strict=True):
        limit = TOLERANCE[dtype] * max(1.0, *map(abs, own["logits"]))
        gap = max(abs(a - b) for a, b in zip(logits, own["logits"], strict=True))
        if not gap <= limit:
            said = f"{gap:.1e}" if math.isfinite(gap) else "not a finite number"
            raise CheckFailed(
                f"{folder}: without this package, its logits differ from those recorded when it was saved: "
                f"{said}, and at most {limit:.1e} is rounding",
                f"Convert it again. {ALL_THE_SAME}",
            )


def alone(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Run `stranger` on a request in a new process that reaches neither the Hub nor transformers' copies of
    other artifacts' code.

    Raises:
        CheckFailed: the process ended with an error, whose last line the message has.
    """
    program = Path(__file__).with_name("stranger.py").read_text()
    with TemporaryDirectory() as modules:
        done = subprocess.run(
            [sys.executable, "-c", program],
            input=json.dumps(request),
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": modules},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise CheckFailed(
            f"{folder} does not load where this package is not installed: {lines[-1]}",
            f"Convert it again. {ALL_THE_SAME}",
        )
    return json.loads(done.stdout.strip().splitlines()[-1])
