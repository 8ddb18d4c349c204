"""The run configuration of a conversion."""

from dataclasses import dataclass
from typing import Any

from linearize_cli.methods.recipe import Recipe

EVAL_TOKENS = 100_000


@dataclass(frozen=True)
class Job:
    """The run configuration of a conversion. A run can only be resumed with the same one.

    Attributes:
        model: the name or the folder of the base model.
        recipe: the method and its training settings.
        data, eval_data: the names of the training texts and of the evaluation text.
        keep_softmax: the argument of `--keep-softmax`.
        seq_len: the number of tokens per block. None: 1024, or the model's context if that is shorter.
        batch_size: the number of blocks per step, over all processes. None: 1 to 8, by the number of tokens.
        train: False for a conversion without training.
        keep_adapter: True to save the LoRA adapter beside the merged model.
        dtype: the name of the model's dtype. None: that of the checkpoint.
        overrides: the recipe's keys that were set by hand, as `KEY=VALUE`. The recipe has them already.
        eval_tokens: the largest number of tokens that quality is measured on.
        medusa_heads: the number of Medusa heads to train. 0 for none.
        medusa_lr: the learning rate of the heads.
        skip_bad_rows: the number of rows of text that cannot be used and may be skipped.
    """

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
    overrides: tuple[str, ...] = ()
    eval_tokens: int = EVAL_TOKENS
    medusa_heads: int = 0
    medusa_lr: float | str = "auto"
    skip_bad_rows: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as JSON data."""
        return {
            **self.__dict__,
            "recipe": self.recipe.to_dict(),
            "data": list(self.data),
            "overrides": list(self.overrides),
        }
