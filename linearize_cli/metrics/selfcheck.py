"""What every conversion proves before it is saved: the forms of the model agree."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearize_cli.errors import CheckFailed
from linearize_cli.metrics.equivalence import Comparison, compare_batch
from linearize_cli.models.decoding import Decoder
from linearize_cli.models.tasks import Task, context_length
from linearize_cli.runtime.dispatch import converted

# Largest logit difference allowed, relative to the largest logit: about 200 roundings of fp32, and what many
# layers of rounding add up to in the narrow types.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
PADS, LAST = 11, 8  # pads of a row, and single tokens at the end


@torch.no_grad()
def self_check(
    task: Task, model: PreTrainedModel, again: PreTrainedModel, ids: Tensor
) -> tuple[dict[str, float | None], float]:
    """Return the largest logit differences between the forms of a model on ids `[2, L]`, and what is allowed.

    `incremental`: one forward against single tokens from the first on, pieces and single tokens again, None for what
    does not decode; `padded`: a row alone against the same row with pads, and where the model decodes through a cache
    too; `reload`: `again`, the model as it was saved.
    """
    rows, row = list(ids), ids[0, PADS:]
    logits = torch.stack(task.read(model, rows))
    size = max(1.0, logits.abs().max().item())
    differences = {
        "incremental": None,
        "padded": largest(task.read(model, [row], extra=PADS)[0], task.read_alone(model, row, PADS)),
        "reload": largest(torch.stack(task.read(again, rows)), logits),
    }
    if task.decodes:
        decoder, _, _ = task.start(model, rows[:1])
        edge = first_edge(model, ids.shape[1])
        differences["incremental"] = incremental_difference(decoder, ids, edge)
        behind_pads = Comparison(1.0, size)
        compare_padded_decoding(task, model, ids, edge, behind_pads)
        differences["padded"] = max(differences["padded"], behind_pads.diff)
    return differences, TOLERANCE[logits.dtype] * size


def first_edge(model: PreTrainedModel, length: int) -> int:
    """Return how many tokens pass the first window or group of every layer by a third, with sinks and conv."""
    equations = [module.linear_attention.equation for module in converted(model).values()]
    return min(length, max(eq.sinks + eq.recent + eq.recent // 3 for eq in equations) + 5)


def require_same(differences: dict[str, float | None], limit: float) -> None:
    """Raises CheckFailed: which forms differ, and by how much."""
    # Written so that a nan fails too.
    failed = [form for form, x in differences.items() if x is not None and not x <= limit]
    if failed:
        raise CheckFailed(
            "the self-check refused the converted model: logits differ by "
            + ", ".join(f"{differences[form]:.2g} ({form})" for form in failed)
            + f", {limit:.2g} is allowed",
            "Nothing was saved. `linearize inspect MODEL` shows its layers; --keep-softmax at:... leaves some out.",
        )


def incremental_difference(decoder: Decoder, ids: Tensor, edge: int) -> float:
    """Return the largest logit difference between one forward and decoding: single tokens from the first on beyond
    the first `edge`, two uneven pieces, and single tokens again.
    """
    cache, left = decoder.new_cache(), max(0, ids.shape[1] - edge - LAST)
    pieces = [1] * edge + [piece for piece in (left * 2 // 3, left - left * 2 // 3) if piece]
    pieces += [1] * (ids.shape[1] - sum(pieces))
    parts = ids.split(pieces, 1)
    return largest(torch.cat([decoder(part, cache) for part in parts], 1), decoder(ids))


def compare_padded_decoding(
    task: Task, model: PreTrainedModel, ids: Tensor, edge: int, worst: Comparison
) -> None:
    """Compare a padded batch with a cache, decoded token by token beyond the first `edge`, with its rows alone."""
    first, last = [ids[0, :PADS], ids[1, :2]], ids[:, PADS : PADS + edge]
    compare_batch(task, model, first, last.split(1, 1), worst)


def largest(actual: Tensor, expected: Tensor) -> float:
    return (actual - expected).abs().max().item()


def check_tokens(model: PreTrainedModel, blocks: torch.Tensor | None) -> torch.Tensor:
    """Tokens `[2, L]` for the self-check, long enough to cross every window and group."""
    recent = max(module.linear_attention.equation.recent for module in converted(model).values())
    length = min(3 * max(recent, 32) + 45, context_length(model))
    if blocks is not None and blocks.numel() >= 2 * length:
        return blocks.flatten()[: 2 * length].view(2, length)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(0, vocabulary, (2, length), generator=generator)
