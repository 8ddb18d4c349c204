"""Loading an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from linearize_cli.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load(
    path: str | Path, *, device: str = "cpu", dtype: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A linearized model, in eval mode, and its tokenizer; `path` is a folder or a Hub id.

    Raises:
        UserError: there is no such artifact, it is no linearized model, or its files are damaged.
    """
    import linearize_cli.runtime
    from linearize_cli.checkpoint import load_teacher

    model, tokenizer = load_teacher(str(path), dtype, device)
    if not isinstance(model, linearize_cli.runtime.LinearizeMixin):
        raise UserError(
            f"{path} is a softmax model ({type(model).__name__}), not a linearized one",
            f"Convert it first: linearize convert {path}",
        )
    return model, tokenizer
