"""The training loop of all stages: interruptible at any moment, with the same result as without."""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from linearize_cli.errors import UserError
from linearize_cli.files import replacing
from linearize_cli.methods.recipe import Stage
from linearize_cli.runtime.model import linear_parameters
from linearize_cli.terminal import Terminal
from linearize_cli.training.engine import Engine, mean_of
from linearize_cli.training.objective import Best, Objective
from linearize_cli.training.parallel import full, placed_like, process_mean

SAVE_EVERY = 20.0  # seconds between checkpoints, at least
SAVE_PAUSE = 20.0  # and times what the last save took, so that saving stays a small part of a run


@dataclass
class Checkpoint:
    """Where a run stands; a file that is replaced as a whole.

    Attributes:
        stage: the stage that was last worked on; step: its finished steps.
        parameters, optimizer: of that stage, after its last finished step.
        best: of that stage, as `objective.Best` keeps it.
        results: what was measured so far.
        log_bytes: length of the log at that moment.
    """

    stage: str = ""
    step: int = 0
    parameters: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    log_bytes: int = 0

    def save(self, path: Path) -> None:
        with replacing(path) as beside:
            torch.save(self.__dict__, beside)

    @classmethod
    def load(cls, path: Path) -> "Checkpoint":
        return cls(**torch.load(path, weights_only=True, map_location="cpu"))


class Log:
    """A JSONL file, a line a record, and the trackers. Only the main process writes."""

    def __init__(self, path: Path, keep_bytes: int, engine: Engine):
        self.engine, self.steps = engine, 0
        if engine.main:
            self.stream = path.open("a+b")
            self.stream.truncate(keep_bytes)
            self.stream.seek(0)
            self.steps = sum("step" in json.loads(line) for line in self.stream)

    def write(self, stage: str, name: str | None = None, **values: Any) -> None:
        """A step of a stage, or what else has a name."""
        if not self.engine.main:
            return
        record = {"stage": stage, **({"name": name} if name else {}), **values}
        self.stream.write((json.dumps(record) + "\n").encode())
        self.stream.flush()
        self.steps += "step" in values
        numbers = {key: value for key, value in values.items() if isinstance(value, dict | float | int)}
        self.engine.tell({stage: {name: numbers} if name else numbers}, self.steps)

    def size(self) -> int:
        return self.stream.seek(0, 2) if self.engine.main else 0


def schedule(step: int, steps: int, warmup: float = 0.1) -> float:
    """Linear warmup over a share of the steps, then a cosine to zero; a factor of the rate for step 0, 1, .."""
    warmup = max(1, int(warmup * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def by_rate(model: nn.Module, lr: float, linear_lr: float | None) -> dict[float, dict[str, Tensor]]:
    """What is trained, by name, under its rate: the linear parts may have one of their own."""
    linear = set() if linear_lr is None else set(map(id, linear_parameters(model)))
    groups: dict[float, dict[str, Tensor]] = {}
    for name, parameter in trainable(model).items():
        groups.setdefault(linear_lr if id(parameter) in linear else lr, {})[name] = parameter
    return groups


def train(
    stage: str,
    objective: Objective,
    batches: Callable[[int], Iterator[Any]],
    steps: int,
    tokens_per_step: int,
    options: Stage,
    checkpoint: Checkpoint,
    folder: Path,
    terminal: Terminal,
    log: Log,
    engine: Engine,
    held_out: Callable[[], Iterator[Any]] | None = None,
) -> None:
    """Train what is trainable in `objective` for `steps` steps, from where `checkpoint` stands. The checkpoint
    holds whole tensors, so any number of processes goes on from it.

    Args:
        objective: a batch -> the loss and further records for the log, scalars by name. Its `independent()` are
            the parameters in groups whose gradients are clipped apart.
        batches: the number of steps already done in this stage -> this process's rows of the batches that follow.
        tokens_per_step: of all processes.
        options: the stage's part of the recipe, its rates as numbers.
        held_out: the batches by which the best parameters are chosen, the same on all processes.
    """
    if checkpoint.stage != stage:
        checkpoint.stage, checkpoint.step, checkpoint.parameters, checkpoint.optimizer = stage, 0, {}, {}
        checkpoint.best = {}
    objective.eval()  # without dropout, the teacher in the same model stays exact and a resumed run the same
    with (
        engine.training(objective) as (compute, trained),
        terminal.progress(stage, steps * tokens_per_step, checkpoint.step * tokens_per_step) as advance,
    ):
        groups = by_rate(trained, options.lr, options.linear_lr)
        parameters = {name: p for group in groups.values() for name, p in group.items()}
        rated = [{"params": list(group.values()), "lr": lr} for lr, group in groups.items()]
        optimizer = torch.optim.AdamW(rated, weight_decay=0.0)
        restore(checkpoint, parameters, optimizer)
        parts = trained.independent()
        best = Best(trained, parameters, held_out, steps, options, checkpoint.best)
        stream = batches(checkpoint.step)
        path, saved, cost = folder / "checkpoint.pt", time.monotonic(), 0.0

        def save() -> None:
            checkpoint.parameters = full({name: p.detach() for name, p in parameters.items()})
            checkpoint.optimizer, checkpoint.log_bytes = full(optimizer.state_dict()), log.size()
            if engine.main:
                checkpoint.save(path)

        while checkpoint.step < steps and not best.stopped:
            batch = next(stream)
            started = time.monotonic()
            factor = schedule(checkpoint.step, steps, options.warmup)
            for group, rate in zip(optimizer.param_groups, groups, strict=True):
                group["lr"] = rate * factor
            trained.step = checkpoint.step
            loss, records = compute(batch)
            due = engine.main and started - saved > max(SAVE_EVERY, SAVE_PAUSE * cost)
            values = mean_of({"loss": loss, "due": loss.new_tensor(due), **records}, process_mean)
            if not math.isfinite(values["loss"]):
                raise UserError(
                    f"{stage}: the loss is no longer a number at step {checkpoint.step + 1}",
                    f"Lower the rate, {options.key}, or use --dtype float32.",
                )
            loss.backward()
            for part in parts:
                nn.utils.clip_grad_norm_(part, math.inf if options.clip is None else options.clip)
            optimizer.step()
            optimizer.zero_grad()
            checkpoint.step += 1
            due, speed = values.pop("due"), tokens_per_step / (time.monotonic() - started)
            values |= best.look(checkpoint.step)
            log.write(
                stage, step=checkpoint.step, lr=options.lr * factor, tokens_per_s=round(speed), **values
            )
            advance(tokens_per_step)
            if due:
                begin = time.monotonic()
                save()
                saved, cost = time.monotonic(), time.monotonic() - begin
        best.restore()
        if best.record:
            terminal.note(f"{stage}: the best of {checkpoint.step} steps was {best.record['step']}")
        done = checkpoint.results.setdefault("steps", {})
        # Of blocks of layers, the one that learned longest.
        done[stage] = max(checkpoint.step, done.get(stage, 0))
        save()


def restore(checkpoint: Checkpoint, parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Parameters and optimizer as the checkpoint has them."""
    with torch.no_grad():
        for name, value in checkpoint.parameters.items():
            parameters[name].copy_(placed_like(value, parameters[name]))
    if checkpoint.optimizer:
        state = {
            index: {
                key: placed_like(value, parameter)
                for key, value in checkpoint.optimizer["state"][index].items()
            }
            for index, parameter in enumerate(parameters.values())
            if index in checkpoint.optimizer["state"]
        }
        optimizer.load_state_dict({**checkpoint.optimizer, "state": state})
