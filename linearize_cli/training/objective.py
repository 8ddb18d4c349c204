"""What a stage of training lowers, and the parameters that do so best on text it does not learn from."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from linearize_cli.methods.recipe import Stage
from linearize_cli.training.parallel import full, placed_like


class Objective(nn.Module):
    """A batch -> its loss, and records for the log: scalars by name.

    Attributes:
        step: which step of its stage it stands at; None: none, it is measured.
    """

    step: int | None = None

    def independent(self) -> list[list[nn.Parameter]]:
        """What is trained, in groups whose gradients are clipped apart."""
        return [[parameter for parameter in self.parameters() if parameter.requires_grad]]


class Best:
    """The parameters with the lowest loss on held-out batches, and when to look no further.

    Args:
        parameters: what is trained, by name.
        held_out: the batches, the same at every look; None: there are no looks.
        steps: of the stage; options: the stage's part of the recipe.
        record: where the best stands, `{step, loss, misses, parameters}`; a checkpoint keeps it. Empty at the start.
    """

    def __init__(
        self,
        objective: Objective,
        parameters: Mapping[str, Tensor],
        held_out: Callable[[], Iterable[Any]] | None,
        steps: int,
        options: Stage,
        record: dict[str, Any],
    ):
        self.objective, self.parameters, self.held_out, self.record = objective, parameters, held_out, record
        self.steps, self.patience = steps, options.early_stop
        self.every = max(1, round(options.evaluate * steps)) if options.evaluate and held_out else None

    @property
    def stopped(self) -> bool:
        return self.patience is not None and self.record.get("misses", 0) >= self.patience

    def look(self, step: int) -> dict[str, float]:
        """After so many steps: the loss on the held-out batches, for the log, where it is time to look."""
        if self.every is None or (step % self.every and step < self.steps):
            return {}
        self.objective.step = None
        with torch.no_grad():
            losses = [self.objective(batch)[0].item() for batch in self.held_out()]
        loss = sum(losses) / len(losses)
        if loss < self.record.get("loss", float("inf")):
            kept = {name: full(p.detach()).clone() for name, p in self.parameters.items()}
            self.record.update(step=step, loss=loss, misses=0, parameters=kept)
        else:
            self.record["misses"] = self.record.get("misses", 0) + 1
        return {"held_out": loss}

    @torch.no_grad()
    def restore(self) -> None:
        """Give the parameters their best values, if there were looks."""
        for name, value in self.record.get("parameters", {}).items():
            self.parameters[name].copy_(placed_like(value, self.parameters[name]))
