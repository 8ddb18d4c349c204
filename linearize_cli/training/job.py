"""The run configuration of a conversion."""

from dataclasses import dataclass
from typing import Any

from linearize_cli.methods.recipe import Recipe


@dataclass(frozen=True)
class Job:
    """The run configuration of a conversion. A resumed run must have the same one."""

    model: str
    recipe: Recipe
    data: tuple[str, ...]
    eval_data: str | None
    keep_softmax: str | None
    seq_len: int | None
    batch_size: int | None
    train: bool
    keep_adapter: bool
    dtype: str | None
    seed: int
    medusa_heads: int = 0
    medusa_lr: float | str = "auto"
    skip_bad_rows: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as JSON data."""
        return {**self.__dict__, "recipe": self.recipe.to_dict(), "data": list(self.data)}
