"""Whether a model computes the same in every way in which it can be run: logits on one batch of rows, compared."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, PreTrainedModel

from linearize_cli.errors import UserError
from linearize_cli.models.decoding import Decoder, marked
from linearize_cli.models.tasks import Task

PIECES = (7, 1, 13, 64, 2, 33)  # of a chunked prefill


@dataclass
class Comparison:
    """The difference that came closest to its limit, of all that one check compared.

    A limit is the tolerance times the largest magnitude, at least 1: that of the model's logits, or that of
    the compared tensor if it is larger: rounding in a state is no smaller than in the logits that it makes.
    Whole numbers (positions, counts) must be equal.
    """

    tolerance: float
    largest: float
    diff: float = 0.0
    limit: float = 0.0

    def __post_init__(self):
        self.limit = self.tolerance * max(1.0, self.largest)

    def add(self, actual: Tensor, expected: Tensor) -> None:
        diff, limit = difference(actual, expected), 0.5
        if expected.is_floating_point():
            limit = self.tolerance * max(1.0, self.largest, finite_max(expected))
        if diff / limit > self.diff / self.limit:
            self.diff, self.limit = diff, limit

    def include(self, other: "Comparison") -> None:
        """Take over what another comparison found, if it came closer to its limit."""
        if other.diff / other.limit > self.diff / self.limit:
            self.diff, self.limit = other.diff, other.limit


def difference(actual: Tensor, expected: Tensor) -> float:
    """The largest absolute difference; a NaN counts as the largest number of the type, equal infinities as 0."""
    wide = torch.promote_types(actual.dtype, torch.float32)
    gap = (actual.to(wide) - expected.to(wide)).abs().masked_fill(actual == expected, 0.0)
    return gap.nan_to_num(nan=torch.finfo(wide).max).max().item()


def finite_max(x: Tensor) -> float:
    """The largest magnitude among the finite elements."""
    return x.nan_to_num(0.0, 0.0, 0.0).abs().max().item()


def sample_rows(model: PreTrainedModel, texts: list[list[int]], length: int, seed: int) -> Tensor:
    """`[2, length]`: random tokens, and those of the texts, joined and repeated."""
    vocabulary = model.get_input_embeddings().num_embeddings
    random = torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(seed))
    joined = torch.tensor([token for ids in texts for token in ids])
    text = joined.repeat(-(-length // len(joined)))[:length]
    return torch.stack([random, text]).to(model.device)


def run(decoder: Decoder, rows: Tensor, pieces: list[int]) -> tuple[Tensor, Cache]:
    """Logits of rows that are fed piece by piece, and the cache after them."""
    cache = decoder.new_cache()
    return torch.cat([decoder(part, cache) for part in rows.split(pieces, 1)], 1), cache


def rounding_noise(
    logits_of: Callable[[Tensor], Tensor], rows: Tensor, dtype: torch.dtype
) -> tuple[float, float]:
    """How far rounding alone moves a logit, and the largest logit.

    The noise is the largest change of a logit when the same sequences go alone or together through forwards
    without a cache, so that matrix products have other shapes: whole rows, and single tokens (M = 1 against
    M = k). It is at least one rounding of the largest logit. Neither a cache nor pads take part, so that no
    fault of theirs passes for noise.

    Raises:
        UserError: the logits are not numbers.
    """
    tokens = rows[:, :16].reshape(-1, 1)
    noise = 0.0
    for together in (tokens, rows):
        logits = logits_of(together)
        alone = torch.cat([logits_of(row[None]) for row in together])
        noise = max(noise, difference(alone, logits))
    if logits.isnan().any():
        raise UserError(
            "the model's logits are not numbers (NaN)", "Try another --dtype; else convert again."
        )
    largest = finite_max(logits)
    return max(noise, torch.finfo(dtype).eps * largest), largest


def compare_forms(
    decoder: Decoder, rows: Tensor, size: int, prefill: Comparison, chunked: Comparison
) -> None:
    """One forward without a cache, and prefills of many lengths, against decoding; then an uneven chunked
    prefill. Prefills shorter than the conv and ones that end at a window's or group's edge are among them.
    """
    length = rows.shape[1]
    full = decoder(rows)
    decoded, _ = run(decoder, rows, [1] * length)
    prefill.add(decoded, full)
    for start in {2, 5, size - 1, size, size + 1, 2 * size - 3, 2 * size, 3 * size + 5}:
        if 1 < start < length:
            end = min(start + 8, length)
            logits, _ = run(decoder, rows[:, :end], [start] + [1] * (end - start))
            prefill.add(logits, decoded[:, :end])
    chunked.add(run(decoder, rows, list(uneven(length)))[0], decoded)


def uneven(length: int) -> Iterator[int]:
    for piece in cycle(PIECES):
        yield min(piece, length)
        length -= piece
        if length <= 0:
            return


def lengths_around(size: int, most: int) -> list[int]:
    """Lengths of rows at the edges of windows and groups."""
    return [n for n in (1, 3, size - 1, size, size + 5, 2 * size + 1) if 1 <= n <= most]


def compare_padding(
    task: Task, model: PreTrainedModel, rows: Tensor, size: int, worst: Comparison, steps: int = 8
) -> None:
    """Compare a padded batch of texts of different lengths, its prefill and 8 single tokens, with each text alone."""
    lengths = lengths_around(size, rows.shape[1] - steps)
    texts = [rows[i % 2, :n] for i, n in enumerate(lengths)]
    follow = torch.stack([rows[i % 2, n : n + steps] for i, n in enumerate(lengths)])
    compare_batch(task, model, texts, follow.split(1, 1), worst)


def compare_batch(
    task: Task,
    model: PreTrainedModel,
    texts: Sequence[Tensor],
    turns: Sequence[Tensor],
    worst: Comparison,
    cache: Cache | None = None,
) -> None:
    """Compare texts in one padded batch, and the turns that follow them, with one forward of each text alone (see
    `Task.alone`), without a cache.

    Args:
        texts: `[T_i]` each; turns: `[B, n]` each, what all rows continue with.
        cache: an empty one; None: a new one.
    """
    decoder, ids, mask = task.start(model, texts)
    cache = decoder.new_cache() if cache is None else cache
    outputs = [decoder(ids, cache, mask)]
    for turn in turns:
        mask = pad(mask, (0, turn.shape[1]), value=1)
        outputs.append(decoder(turn, cache, mask))
    logits, follow = torch.cat(outputs, 1), torch.cat(list(turns), 1)
    for row, text in enumerate(texts):
        alone, first, mask = task.alone(model, text, ids.shape[1] - len(text))
        whole, mask = torch.cat([first, follow[row, None]], 1), pad(mask, (0, follow.shape[1]), value=1)
        expected = marked(alone(whole, None, mask), mask)[0]
        worst.add(logits[row, -len(expected) :], expected)


def compare_reading(task: Task, model: PreTrainedModel, rows: Tensor, size: int, worst: Comparison) -> None:
    """A padded batch of rows of different lengths against each row alone."""
    texts = [rows[i % 2, :n] for i, n in enumerate(lengths_around(size, rows.shape[1]))]
    for text, logits in zip(texts, task.read(model, texts), strict=True):
        worst.add(logits, task.read(model, [text])[0])


def compare_reload(task: Task, model: PreTrainedModel, rows: Tensor, worst: Comparison) -> None:
    """The model against itself, saved and loaded again."""
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = type(model).from_pretrained(folder, dtype=model.dtype).to(model.device).eval()
    for actual, expected in zip(task.read(again, list(rows)), task.read(model, list(rows)), strict=True):
        worst.add(actual, expected)
