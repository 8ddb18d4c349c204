"""The progress of a run: its checkpoint, its log, and the `Session` that holds both."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linearize_cli.errors import UserError
from linearize_cli.files import replacing
from linearize_cli.hub import brief
from linearize_cli.terminal import Terminal
from linearize_cli.training.engine import Engine
from linearize_cli.training.micro_batches import MicroBatches, Result

FILE = "checkpoint.pt"


@dataclass
class Checkpoint:
    """The progress of a run. A save replaces the whole file at once, so a killed run leaves the old or the
    new file.

    Attributes:
        stage: the name of the current stage. Empty before the first one.
        step: the number of finished steps of that stage.
        parameters: the trained parameters by name, after the last finished step.
        optimizer: the optimizer's state dict after that step.
        best: the best parameters of that stage and their loss (the `record` of `objective.Best`).
        results: the measurements so far, by name.
        log_bytes: the length of the log file at that step.
    """

    stage: str = ""
    step: int = 0
    parameters: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    log_bytes: int = 0

    def save(self, path: Path) -> None:
        """Write the checkpoint to a file."""
        with replacing(path) as temporary:
            torch.save(self.__dict__, temporary)

    @classmethod
    def load(cls, path: Path) -> "Checkpoint":
        """Read a checkpoint from a file, or return an empty one if there is no file.

        Raises:
            UserError: the file cannot be read.
        """
        if not path.exists():
            return cls()
        try:
            return cls(**torch.load(path, weights_only=True, map_location="cpu"))
        except Exception as error:  # torch, zipfile and pickle have types of their own
            raise UserError(
                f"{path} is damaged: {brief(error)}",
                "Start over: the same command with --force, not --resume.",
            ) from error


class Log:
    """A file with one JSON record per line. The numbers of each record are also sent to the experiment
    trackers.

    Only the main process of a distributed run writes. In the others nothing happens.

    Args:
        path: the file.
        keep_bytes: the number of bytes to keep of an existing file. Later records are deleted.
    """

    def __init__(self, path: Path, keep_bytes: int, engine: Engine):
        self.engine, self.steps = engine, 0
        if engine.main:
            self.stream = path.open("a+b")
            self.stream.truncate(keep_bytes)
            self.stream.seek(0)
            self.steps = sum("step" in json.loads(line) for line in self.stream)

    def write(self, stage: str, name: str | None = None, **values: Any) -> None:
        """Append a record to the file.

        Args:
            stage: the name of the stage.
            name: the name of a result. None for a training step, whose values include `step`.
            values: the values of the record, in JSON types.
        """
        if not self.engine.main:
            return
        record = {"stage": stage, **({"name": name} if name else {}), **values}
        self.stream.write((json.dumps(record) + "\n").encode())
        self.stream.flush()
        self.steps += "step" in values
        numbers = {key: value for key, value in values.items() if isinstance(value, dict | float | int)}
        self.engine.tell({stage: {name: numbers} if name else numbers}, self.steps)

    def size(self) -> int:
        """Return the size of the file in bytes, 0 in processes other than the main one."""
        return self.stream.seek(0, 2) if self.engine.main else 0


@dataclass(frozen=True)
class Session:
    """The environment of a training run: the processes, the terminal, the folder, and the progress
    so far.

    Attributes:
        engine: the processes that train together.
        terminal: the output to the user.
        folder: the folder of the checkpoint and the log.
        checkpoint: the progress, from which an interrupted run continues.
        log: the log of steps and results.
        micro: the number of rows that are in memory at a time.
    """

    engine: Engine
    terminal: Terminal
    folder: Path
    checkpoint: Checkpoint
    log: Log
    micro: MicroBatches = field(default_factory=MicroBatches)

    @classmethod
    def open(cls, engine: Engine, terminal: Terminal, folder: Path, log: str = "log.jsonl") -> "Session":
        """Return a session that continues the checkpoint in a folder, or starts a new one if there is none.

        Args:
            log: the file name of the log.
        """
        checkpoint = Checkpoint.load(folder / FILE)
        return cls(engine, terminal, folder, checkpoint, Log(folder / log, checkpoint.log_bytes, engine))

    def in_memory(self, function: Callable[[int], Result], batch: int) -> Result:
        """Call a function with the number of rows that are in memory at a time. If memory runs out, call it
        again with half of that number.

        Args:
            batch: the number of rows of the whole batch.
        """
        return self.micro.run(function, batch, self.terminal, self.engine.processes == 1)

    def save(self) -> None:
        """Write the checkpoint to the folder."""
        self.checkpoint.save(self.folder / FILE)
