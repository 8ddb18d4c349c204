"""The run configuration of a conversion."""

import os
import shlex
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

    def command(self, bundled: bool) -> str:
        """Return the `linearize convert` command of this configuration. Local paths are shortened to their last
        part.

        Args:
            bundled: True if the recipe is the package's method of its name. Else the command names the
                artifact's `recipe.yaml`, which has the overrides already.
        """
        parts = ["linearize", "convert", shown(self.model)]
        parts += ["--method", self.recipe.name if bundled else "recipe.yaml"]
        for source in self.data:
            parts += ["--data", shown(source)]
        options = {
            "--eval-data": self.eval_data and shown(self.eval_data),
            "--eval-tokens": self.eval_tokens if self.eval_tokens != EVAL_TOKENS else None,
            "--tokens": self.recipe.recover.tokens if self.train else None,
            "--keep-softmax": self.keep_softmax,
            "--seq-len": self.seq_len,
            "--batch-size": self.batch_size,
            "--dtype": self.dtype,
            "--medusa-heads": self.medusa_heads or None,
            "--skip-bad-rows": self.skip_bad_rows or None,
            "--seed": self.seed or None,
        }
        for key, value in options.items():
            parts += [] if value is None else [key, str(value)]
        for override in self.overrides if bundled else ():
            key, _, value = override.partition("=")
            parts += ["--set", f"{key}={shown(value)}"]
        parts += [] if self.train else ["--no-train"]
        parts += ["--keep-adapter"] if self.keep_adapter else []
        return shlex.join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as JSON data."""
        return {
            **self.__dict__,
            "recipe": self.recipe.to_dict(),
            "data": list(self.data),
            "overrides": list(self.overrides),
        }


def shown(name: str) -> str:
    """Return a name on the Hub unchanged, and a local path without its folders. `PATH:PART` keeps its part."""
    path, colon, part = name.partition(":")
    local = path.startswith((".", "/", "~")) or os.path.exists(path)
    return os.path.basename(os.path.abspath(path)) + colon + part if local else name
