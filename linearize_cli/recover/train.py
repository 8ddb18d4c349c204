"""The training loop of both stages: interruptible at any moment, with the same result as without."""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from linearize_cli.console import Terminal
from linearize_cli.errors import UserError

SAVE_EVERY = 20.0  # seconds between checkpoints, at least
SAVE_PAUSE = 20.0  # and times what the last save took, so that saving stays a small part of a run
WARMUP = 0.1
CLIP = 1.0


@dataclass
class Checkpoint:
    """Where a run stands; a file that is replaced as a whole.

    Attributes:
        stage: the stage that was last worked on; step: its finished steps.
        parameters, optimizer: of that stage, after its last finished step.
        results: what was measured so far.
        log_bytes: length of the log at that moment.
    """

    stage: str = ""
    step: int = 0
    parameters: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    log_bytes: int = 0

    def save(self, path: Path) -> None:
        beside = path.with_suffix(".new")
        try:
            torch.save(self.__dict__, beside)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> "Checkpoint":
        return cls(**torch.load(path, weights_only=True, map_location="cpu"))


class Log:
    """A JSONL file, a line a record."""

    def __init__(self, path: Path, keep_bytes: int = 0):
        self.stream = path.open("ab")
        self.stream.truncate(keep_bytes)

    def write(self, **record: Any) -> None:
        self.stream.write((json.dumps(record) + "\n").encode())
        self.stream.flush()

    def size(self) -> int:
        return self.stream.seek(0, 2)


def schedule(step: int, steps: int) -> float:
    """Linear warmup over the first tenth, then a cosine to zero; a factor of the rate for step 0, 1, .."""
    warmup = max(1, int(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def numbers(records: Any) -> Any:
    """Scalars as plain numbers, in dicts of any depth."""
    if isinstance(records, dict):
        return {name: numbers(value) for name, value in records.items()}
    return records.item()


def train(
    stage: str,
    objective: nn.Module,
    batches: Callable[[int], Iterator[Any]],
    steps: int,
    tokens_per_step: int,
    lr: float,
    checkpoint: Checkpoint,
    folder: Path,
    terminal: Terminal,
    log: Log,
) -> None:
    """Train what is trainable in `objective` for `steps` steps, from where `checkpoint` stands.

    Args:
        objective: a batch -> the loss and further records for the log, scalars by name.
        batches: the number of steps already done in this stage -> the batches that follow.
        lr: the peak rate of AdamW.
    """
    parameters = trainable(objective)
    optimizer = torch.optim.AdamW(parameters.values(), lr=lr, weight_decay=0.0)
    if checkpoint.stage == stage:
        with torch.no_grad():
            for name, value in checkpoint.parameters.items():
                parameters[name].copy_(value)
        if checkpoint.optimizer:
            optimizer.load_state_dict(checkpoint.optimizer)
    else:
        checkpoint.stage, checkpoint.step = stage, 0
    path, saved, cost = folder / "checkpoint.pt", time.monotonic(), 0.0

    def save() -> None:
        checkpoint.parameters = {name: p.detach() for name, p in parameters.items()}
        checkpoint.optimizer, checkpoint.log_bytes = optimizer.state_dict(), log.size()
        checkpoint.save(path)

    stream = batches(checkpoint.step)
    objective.eval()  # without dropout, the teacher in the same model stays exact and a resumed run the same
    with terminal.progress(stage, steps * tokens_per_step, checkpoint.step * tokens_per_step) as advance:
        while checkpoint.step < steps:
            batch = next(stream)
            started = time.monotonic()
            rate = lr * schedule(checkpoint.step, steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss, records = objective(batch)
            if not loss.isfinite():
                raise UserError(
                    f"{stage}: the loss is no longer a number at step {checkpoint.step + 1}",
                    f"Lower the rate, recover.{stage}.lr, or use --dtype float32.",
                )
            loss.backward()
            nn.utils.clip_grad_norm_(parameters.values(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            checkpoint.step += 1
            speed = tokens_per_step / (time.monotonic() - started)
            log.write(
                stage=stage,
                step=checkpoint.step,
                loss=loss.item(),
                lr=rate,
                tokens_per_s=round(speed),
                **numbers(records),
            )
            advance(tokens_per_step)
            if time.monotonic() - saved > max(SAVE_EVERY, SAVE_PAUSE * cost):
                begin = time.monotonic()
                save()
                saved, cost = time.monotonic(), time.monotonic() - begin
    save()
