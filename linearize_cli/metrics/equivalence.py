"""Comparisons of a model's logits between the ways to compute them (forms).

The forms are prefill, chunked prefill, decoding, padded batches, and the model after saving and loading.
"""

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
from linearize_cli.models.task import Task

CHUNKS = (7, 1, 13, 64, 2, 33)  # tokens of the chunks of a chunked prefill, repeated in a cycle


@dataclass
class Comparison:
    """The worst difference of one check: the one with the largest ratio to its limit.

    The limit is the tolerance times the largest magnitude of the model's logits or of the compared tensor,
    and at least the tolerance itself. Integers (positions, counts) must be equal.

    Attributes:
        tolerance: the relative difference that is allowed.
        largest: the largest absolute logit of the model.
        diff: the worst difference so far. 0 before the first one.
        limit: the largest value allowed for that difference.
    """

    tolerance: float
    largest: float
    diff: float = 0.0
    limit: float = 0.0

    def __post_init__(self):
        self.limit = self.tolerance * max(1.0, self.largest)

    def add(self, actual: Tensor, expected: Tensor) -> None:
        """Compare two tensors of the same shape, and keep their difference if it is the worst so far."""
        diff, limit = difference(actual, expected), 0.5
        if expected.is_floating_point():
            limit = self.tolerance * max(1.0, self.largest, finite_max(expected))
        if diff / limit > self.diff / self.limit:
            self.diff, self.limit = diff, limit

    def include(self, other: "Comparison") -> None:
        """Keep the difference of another comparison if it is the worst so far, relative to its limit."""
        if other.diff / other.limit > self.diff / self.limit:
            self.diff, self.limit = other.diff, other.limit


def difference(actual: Tensor, expected: Tensor) -> float:
    """Return the largest absolute difference of two tensors of the same shape.

    A NaN gives the largest number of the dtype. Equal infinities give 0.
    """
    wide = torch.promote_types(actual.dtype, torch.float32)
    gap = (actual.to(wide) - expected.to(wide)).abs().masked_fill(actual == expected, 0.0)
    return gap.nan_to_num(nan=torch.finfo(wide).max).max().item()


def finite_max(x: Tensor) -> float:
    """Return the largest absolute value of the finite elements."""
    return x.nan_to_num(0.0, 0.0, 0.0).abs().max().item()


def sample_rows(model: PreTrainedModel, texts: list[list[int]], length: int, seed: int) -> Tensor:
    """Return two rows of token ids `[2, length]`: random ones, and the texts' tokens joined and repeated."""
    vocabulary = model.get_input_embeddings().num_embeddings
    random = torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(seed))
    joined = torch.tensor([token for ids in texts for token in ids])
    text = joined.repeat(-(-length // len(joined)))[:length]
    return torch.stack([random, text]).to(model.device)


def run(decoder: Decoder, rows: Tensor, chunks: list[int]) -> tuple[Tensor, Cache]:
    """Read rows `[B, T]` in chunks with a new cache.

    Args:
        chunks: the lengths of the chunks. They add up to T.

    Returns:
        The logits `[B, T, vocab]`, and the cache after them.
    """
    cache = decoder.new_cache()
    return torch.cat([decoder(part, cache) for part in rows.split(chunks, 1)], 1), cache


def rounding_noise(
    logits_of: Callable[[Tensor], Tensor], rows: Tensor, dtype: torch.dtype
) -> tuple[float, float]:
    """Measure how much rounding alone changes a logit.

    The noise is the largest difference between sequences in a batch and the same sequences alone, for whole
    rows and for single tokens. Only the shapes of the matrix products differ. The forwards use neither a
    cache nor padding, so faults of these cannot hide in the noise.

    Args:
        logits_of: a function from ids `[B, T]` to logits.
        rows: token ids `[B, T]`.
        dtype: the dtype in which the model computes.

    Returns:
        The noise, at least one rounding of the largest logit, and the largest absolute logit.

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
            "the model's logits are not numbers (NaN)", "Try another --dtype, or convert the model again."
        )
    largest = finite_max(logits)
    return max(noise, torch.finfo(dtype).eps * largest), largest


def compare_forms(
    decoder: Decoder, rows: Tensor, size: int, prefill: Comparison, chunked: Comparison
) -> None:
    """Compare the ways to compute logits with decoding one token at a time.

    They are one forward without a cache, prefills of many lengths, and a prefill in uneven chunks. Some
    prefills are shorter than the convolution, some end where a window or group ends.

    Args:
        decoder: the model.
        rows: token ids `[B, T]`.
        size: the largest window or group of the model's layers, in tokens.
        prefill: collects the differences of full forwards and prefills.
        chunked: collects the differences of the chunked prefill.
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
    """Yield the lengths of uneven chunks that add up to `length`."""
    for chunk in cycle(CHUNKS):
        yield min(chunk, length)
        length -= chunk
        if length <= 0:
            return


def lengths_around(size: int, most: int) -> list[int]:
    """Return lengths of texts to test: very short ones, and those around one and two windows (or groups) of
    `size` tokens.

    All are between 1 and `most`.
    """
    return [n for n in (1, 3, size - 1, size, size + 5, 2 * size + 1) if 1 <= n <= most]


def compare_padding(
    task: Task, model: PreTrainedModel, rows: Tensor, size: int, worst: Comparison, steps: int = 8
) -> None:
    """Compare a padded batch of texts of different lengths, and `steps` single tokens after it, with each
    text alone.

    Args:
        rows: token ids `[2, T]` that the texts are taken from.
        size: the largest window or group of the model's layers, in tokens.
        worst: collects the differences.
    """
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
    """Compare a padded batch, decoded with a cache, with a forward of each text alone without a cache.

    Args:
        texts: the texts of the batch, token ids `[T_i]` each.
        turns: tokens that follow the texts. Each `[B, n]` is read in one forward.
        worst: collects the differences.
        cache: an empty cache to use. None makes a new one.
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
    """Compare rows of different lengths in one padded batch with each row alone, without a cache.

    Args:
        rows: token ids `[2, T]` that the texts are taken from.
        size: the largest window or group of the model's layers, in tokens.
        worst: collects the differences.
    """
    texts = [rows[i % 2, :n] for i, n in enumerate(lengths_around(size, rows.shape[1]))]
    for text, logits in zip(texts, task.read(model, texts), strict=True):
        worst.add(logits, task.read(model, [text])[0])


def compare_reload(task: Task, model: PreTrainedModel, rows: Tensor, worst: Comparison) -> None:
    """Compare the model's logits on rows `[B, T]` with those of a copy that was saved and loaded. `worst`
    collects the differences.
    """
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = type(model).from_pretrained(folder, dtype=model.dtype).to(model.device).eval()
    for actual, expected in zip(task.read(again, list(rows)), task.read(model, list(rows)), strict=True):
        worst.add(actual, expected)
