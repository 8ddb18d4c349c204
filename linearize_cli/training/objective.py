"""The objective of a training stage, and the selection of the best parameters on held-out text."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from linearize_cli.methods.recipe import Stage
from linearize_cli.models.batch import Batch
from linearize_cli.training.micro_batches import MicroBatches
from linearize_cli.training.parallel import full, placed_like


class Objective(nn.Module):
    """A module that maps a batch to its loss and to scalars for the log, by name. The losses and scalars of the
    parts of a batch add up to those of the batch.

    Attributes:
        step: the current step of the stage. None outside training steps (evaluation).
    """

    step: int | None = None

    def independent(self) -> list[list[nn.Parameter]]:
        """Return the trained parameters in groups whose gradients are clipped separately."""
        return [[parameter for parameter in self.parameters() if parameter.requires_grad]]


class Best:
    """The parameters with the lowest loss on held-out batches, and the rule for early stopping.

    Args:
        objective: the objective that is evaluated.
        parameters: the trained parameters, by name.
        held_out: returns the same batches at every evaluation. None means no evaluation.
        steps: the number of steps of the stage.
        options: the stage's part of the recipe: how often to evaluate, and `early_stop`.
        record: the best evaluation, kept in the checkpoint: its `step`, `loss` and `parameters`, and in
            `misses` the number of evaluations since then. Empty before the first evaluation.
        micro: the number of rows that are in memory at a time.
    """

    def __init__(
        self,
        objective: Objective,
        parameters: Mapping[str, Tensor],
        held_out: Callable[[], Iterable[Batch]] | None,
        steps: int,
        options: Stage,
        record: dict[str, Any],
        micro: MicroBatches,
    ):
        self.objective, self.parameters, self.held_out, self.record = objective, parameters, held_out, record
        self.micro = micro
        self.steps, self.patience = steps, options.early_stop
        self.every = max(1, round(options.evaluate * steps)) if options.evaluate and held_out else None

    @property
    def stopped(self) -> bool:
        """Return True if the loss has not improved in the last `early_stop` evaluations. Without
        `early_stop`, return False.
        """
        return self.patience is not None and self.record.get("misses", 0) >= self.patience

    def evaluate(self, step: int) -> dict[str, float]:
        """Evaluate the held-out batches if an evaluation is due at this step, and keep the parameters if they
        are the best.

        Returns:
            the loss, as `{"held_out": loss}` for the log. An empty dict if no evaluation is due.
        """
        if self.every is None or (step % self.every and step < self.steps):
            return {}
        self.objective.step = None
        with torch.no_grad():
            losses = [
                sum(self.objective(part)[0].item() for part in batch.parts(self.micro.rows))
                for batch in self.held_out()
            ]
        loss = sum(losses) / len(losses)
        if loss < self.record.get("loss", float("inf")):
            kept = {name: full(p.detach()).clone() for name, p in self.parameters.items()}
            self.record.update(step=step, loss=loss, misses=0, parameters=kept)
        else:
            self.record["misses"] = self.record.get("misses", 0) + 1
        return {"held_out": loss}

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the best parameters. Without an evaluation, the parameters stay as they are."""
        for name, value in self.record.get("parameters", {}).items():
            self.parameters[name].copy_(placed_like(value, self.parameters[name]))
