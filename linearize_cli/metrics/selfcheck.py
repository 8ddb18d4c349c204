"""The self-check of every conversion before it is saved: all ways to compute the logits must agree."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearize_cli.errors import CheckFailed
from linearize_cli.metrics.equivalence import Comparison, compare_batch
from linearize_cli.models.decoding import Decoder
from linearize_cli.models.positions import context_length
from linearize_cli.models.task import Task
from linearize_cli.runtime.dispatch import converted

# Largest logit difference allowed, relative to the largest logit. In fp32 this is about 200 roundings. In half
# precision it is what the rounding of many layers adds up to.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
PADS, LAST = 11, 8  # pads before a row, and single tokens at the end of a row


@torch.no_grad()
def self_check(task: Task, model: PreTrainedModel, ids: Tensor) -> tuple[dict[str, float | None], Tensor]:
    """Compare the ways in which a converted model can compute logits.

    Args:
        ids: token ids `[2, L]`.

    Returns:
        The largest logit differences, and the logits of both rows, with which `reload_difference` compares the
            saved model. The differences are:
            incremental: one forward against decoding with single tokens and chunks. None for an encoder.
            padded: a row alone against the same row with pads. Decoding with a cache is included.
    """
    rows, row = list(ids), ids[0, PADS:]
    logits = torch.stack(task.read(model, rows))
    differences = {
        "incremental": None,
        "padded": largest(task.read(model, [row], extra=PADS)[0], task.read_alone(model, row, PADS)),
    }
    if task.decodes:
        decoder, _, _ = task.start(model, rows[:1])
        edge = first_edge(model, ids.shape[1])
        differences["incremental"] = incremental_difference(decoder, ids, edge)
        behind_pads = Comparison(1.0, scale(logits))
        compare_padded_decoding(task, model, ids, edge, behind_pads)
        differences["padded"] = max(differences["padded"], behind_pads.diff)
    return differences, logits


@torch.no_grad()
def reload_difference(task: Task, loaded: PreTrainedModel, ids: Tensor, logits: Tensor) -> float:
    """Return the largest difference of a saved and reloaded model's logits from those of the model in memory.

    Args:
        ids: token ids `[2, L]`.
        logits: the logits of the model in memory (see `self_check`).
    """
    return largest(torch.stack(task.read(loaded, list(ids))), logits)


def scale(logits: Tensor) -> float:
    """Return the largest absolute logit, at least 1, to which differences are compared."""
    return max(1.0, logits.abs().max().item())


def first_edge(model: PreTrainedModel, length: int) -> int:
    """Return a number of tokens after which every layer has filled its sinks and first window or group, with
    a third to spare.

    It is at most `length`.
    """
    equations = [module.linear_attention.equation for module in converted(model).values()]
    return min(length, max(eq.sinks + eq.recent + eq.recent // 3 for eq in equations) + 5)


def require_same(differences: dict[str, float | None], logits: Tensor) -> None:
    """Check that all differences of the self-check are within the limit of their dtype. A difference of None was
    not measured.

    Args:
        logits: the logits that were compared.

    Raises:
        CheckFailed: a difference exceeds the limit. The message names each, and by how much.
    """
    limit = TOLERANCE[logits.dtype] * scale(logits)
    # `not x <= limit` is also true for NaN.
    failed = [form for form, x in differences.items() if x is not None and not x <= limit]
    if failed:
        raise CheckFailed(
            "the self-check refused the converted model: logits differ by "
            + ", ".join(f"{differences[form]:.2g} ({form})" for form in failed)
            + f", and {limit:.2g} is allowed",
            "Nothing was saved. See the layers with `linearize inspect MODEL`, and leave some out with "
            "--keep-softmax at:i,j.",
        )


def incremental_difference(decoder: Decoder, ids: Tensor, edge: int) -> float:
    """Return the largest logit difference between one forward of ids `[B, L]` and decoding them with a cache.

    Decoding reads `edge` single tokens, then two uneven chunks, then single tokens again.

    Args:
        edge: the number of tokens that fill the first window or group.
    """
    cache, left = decoder.new_cache(), max(0, ids.shape[1] - edge - LAST)
    lengths = [1] * edge + [chunk for chunk in (left * 2 // 3, left - left * 2 // 3) if chunk]
    lengths += [1] * (ids.shape[1] - sum(lengths))
    parts = ids.split(lengths, 1)
    return largest(torch.cat([decoder(part, cache) for part in parts], 1), decoder(ids))


def compare_padded_decoding(
    task: Task, model: PreTrainedModel, ids: Tensor, edge: int, worst: Comparison
) -> None:
    """Compare a padded batch, followed by single tokens with a cache, with each row alone.

    Args:
        ids: token ids `[B, L]` that the rows are taken from.
        edge: the number of single tokens: enough to fill the first window or group.
        worst: collects the differences.
    """
    first, last = [ids[0, :PADS], ids[1, :2]], ids[:, PADS : PADS + edge]
    compare_batch(task, model, first, last.split(1, 1), worst)


def largest(actual: Tensor, expected: Tensor) -> float:
    """Return the largest absolute difference of two tensors."""
    return (actual - expected).abs().max().item()


def check_tokens(model: PreTrainedModel, blocks: torch.Tensor | None) -> torch.Tensor:
    """Return ids `[2, L]` for the self-check, long enough to cross a boundary of every window and group.

    Args:
        blocks: evaluation blocks to take the tokens from. Random tokens are used if they are None or too few.
    """
    recent = max(module.linear_attention.equation.recent for module in converted(model).values())
    length = min(3 * max(recent, 32) + 45, context_length(model))
    if blocks is not None and blocks.numel() >= 2 * length:
        return blocks.flatten()[: 2 * length].view(2, length)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(0, vocabulary, (2, length), generator=generator)
