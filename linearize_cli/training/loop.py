"""The training loop of all stages. An interrupted run can be resumed with the same result."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn

from linearize_cli.errors import UserError
from linearize_cli.methods.recipe import Stage
from linearize_cli.models.batch import Batch
from linearize_cli.runtime.model import linear_parameters
from linearize_cli.training.checkpoint import Checkpoint, Session
from linearize_cli.training.engine import mean_of
from linearize_cli.training.objective import Best, Objective
from linearize_cli.training.parallel import full, placed_like, process_mean

SAVE_EVERY = 20.0  # minimum time between checkpoints, in seconds
SAVE_PAUSE = 20.0  # and in multiples of the last save's time, so that saving stays a small part of a run


@dataclass(frozen=True)
class StagePlan:
    """The plan of one stage of training.

    Attributes:
        name: the stage's name in the log and the checkpoint.
        steps: the number of steps.
        tokens_per_step: the number of tokens in a batch, over all processes.
        options: the stage's part of the recipe, with learning rates as numbers.
    """

    name: str
    steps: int
    tokens_per_step: int
    options: Stage


def schedule(step: int, steps: int, warmup: float = 0.1) -> float:
    """Return the factor of the learning rate at a step: linear warmup to 1, then a cosine to 0.

    Args:
        step: the number of finished steps.
        steps: the number of steps of the stage.
        warmup: the share of the steps that warm up.
    """
    warmup = max(1, int(warmup * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that require gradients, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def by_rate(model: nn.Module, lr: float, linear_lr: float | None) -> dict[float, dict[str, Tensor]]:
    """Group the trainable parameters by learning rate.

    Args:
        lr: the rate of all parameters, except those with `linear_lr`.
        linear_lr: the rate of the parameters that the conversion added. None: they have `lr` too.

    Returns:
        the parameters by name, under each rate.
    """
    linear = set() if linear_lr is None else set(map(id, linear_parameters(model)))
    groups: dict[float, dict[str, Tensor]] = {}
    for name, parameter in trainable(model).items():
        groups.setdefault(linear_lr if id(parameter) in linear else lr, {})[name] = parameter
    return groups


def train(
    plan: StagePlan,
    objective: Objective,
    batches: Callable[[int], Iterator[Batch]],
    session: Session,
    held_out: Callable[[], Iterator[Batch]] | None = None,
) -> None:
    """Train the trainable parameters of `objective`, from the step that the session's checkpoint has reached.

    The checkpoint holds unsharded tensors, so a run can be resumed with another number of processes.

    Args:
        plan: the stage's name, steps and options.
        objective: maps a batch, or a part of one, to its share of the loss and of more scalars for the log,
            by name. The gradients of each group of `objective.independent()` are clipped separately.
        batches: a function that takes the number of finished steps, and returns this process's share of the
            batches that follow.
        held_out: returns the batches that select the best parameters, the same in all processes. None: the
            last parameters are kept.

    Raises:
        UserError: the loss is not finite.
    """
    checkpoint, engine, options = session.checkpoint, session.engine, plan.options
    stage, steps, tokens_per_step = plan.name, plan.steps, plan.tokens_per_step
    if checkpoint.stage != stage:
        checkpoint.stage, checkpoint.step, checkpoint.parameters, checkpoint.optimizer = stage, 0, {}, {}
        checkpoint.best = {}
    # Without dropout the teacher in the same model stays exact, and a resumed run gives the same result.
    objective.eval()
    with (
        engine.training(objective) as (compute, trained),
        session.terminal.progress(
            stage, steps * tokens_per_step, checkpoint.step * tokens_per_step
        ) as advance,
    ):
        groups = by_rate(trained, options.lr, options.linear_lr)
        parameters = {name: p for group in groups.values() for name, p in group.items()}
        rated = [{"params": list(group.values()), "lr": lr} for lr, group in groups.items()]
        optimizer = torch.optim.AdamW(rated, weight_decay=0.0)
        restore(checkpoint, parameters, optimizer)
        parts = trained.independent()
        best = Best(trained, parameters, held_out, steps, options, checkpoint.best, session.micro)
        stream = batches(checkpoint.step)
        saved, cost = time.monotonic(), 0.0

        def save() -> None:
            checkpoint.parameters = full({name: p.detach() for name, p in parameters.items()})
            checkpoint.optimizer, checkpoint.log_bytes = full(optimizer.state_dict()), session.log.size()
            if engine.main:
                session.save()

        while checkpoint.step < steps and not best.stopped:
            batch = next(stream)
            started = time.monotonic()
            factor = schedule(checkpoint.step, steps, options.warmup)
            for group, rate in zip(optimizer.param_groups, groups, strict=True):
                group["lr"] = rate * factor
            trained.step = checkpoint.step
            loss, records = session.in_memory(partial(add_gradients, compute, optimizer, batch), len(batch))
            due = engine.main and started - saved > max(SAVE_EVERY, SAVE_PAUSE * cost)
            values = mean_of({"loss": loss, "due": loss.new_tensor(due), **records}, process_mean)
            if not math.isfinite(values["loss"]):
                raise UserError(
                    f"{stage}: the loss is not finite at step {checkpoint.step + 1}",
                    f"Lower the learning rate ({options.key}), or use --dtype float32.",
                )
            for part in parts:
                nn.utils.clip_grad_norm_(part, math.inf if options.clip is None else options.clip)
            optimizer.step()
            optimizer.zero_grad()
            checkpoint.step += 1
            due, speed = values.pop("due"), tokens_per_step / (time.monotonic() - started)
            values |= best.evaluate(checkpoint.step)
            session.log.write(
                stage, step=checkpoint.step, lr=options.lr * factor, tokens_per_s=round(speed), **values
            )
            advance(tokens_per_step)
            if due:
                begin = time.monotonic()
                save()
                saved, cost = time.monotonic(), time.monotonic() - begin
        best.restore()
        if best.record:
            session.terminal.note(
                f"{stage}: the parameters of step {best.record['step']} of {checkpoint.step} are the best"
            )
        done = checkpoint.results.setdefault("steps", {})
        # In layerwise transfer several blocks share a stage: keep the largest number of steps.
        done[stage] = max(checkpoint.step, done.get(stage, 0))
        save()


def add_gradients(
    compute: Callable[[Batch], tuple[Tensor, dict[str, Any]]],
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    rows: int,
) -> tuple[Tensor, dict[str, Any]]:
    """Compute the gradients of a batch, `rows` rows at a time.

    Args:
        compute: maps a part of the batch to its share of the loss, and of the scalars for the log.

    Returns:
        the loss of the batch (a scalar), and the scalars for the log.
    """
    optimizer.zero_grad()  # an earlier attempt may have left gradients
    results = []
    for part in batch.parts(rows):
        loss, records = compute(part)
        loss.backward()
        results.append({"loss": loss.detach(), **records})
    total = reduce(added, results)
    return total.pop("loss"), total


def added(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Return the sums of two dicts of numbers that have the same keys. Both may contain dicts."""
    return {
        key: added(x, second[key]) if isinstance(x, dict) else x + second[key] for key, x in first.items()
    }


def restore(checkpoint: Checkpoint, parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Load the parameters and the optimizer's state from the checkpoint. If it is empty, change nothing."""
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
