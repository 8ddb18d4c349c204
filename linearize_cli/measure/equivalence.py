"""Whether a model with a cache computes the same in every way in which it can be run.

Each check compares logits on one batch of rows; `compare_rollback` compares the states of the layers as well.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, DynamicCache, PreTrainedModel

from linearize_cli.errors import UserError
from linearize_cli.runtime.cache import ROLLBACK, LinearCacheLayer
from linearize_cli.runtime.dispatch import converted

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

    @property
    def failed(self) -> bool:
        return self.diff > self.limit


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


def forward(
    model: PreTrainedModel, ids: Tensor, cache: Cache | None = None, mask: Tensor | None = None
) -> Tensor:
    """Logits `[B, T, vocab]` of ids `[B, T]`; mask `[B, past + T]`, 0 for the pads on the left, None: no pads.

    Positions are given as `generate` gives them: what some models make of none is not what they make of these.
    """
    if mask is None:
        past = 0 if cache is None else cache.get_seq_length()
        mask = ids.new_ones(ids.shape[0], past + ids.shape[1])
    inputs = {"attention_mask": mask}
    if "position_ids" in signature(model.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    return model(input_ids=ids, past_key_values=cache, use_cache=cache is not None, **inputs).logits


def counts_pads(model: PreTrainedModel) -> bool:
    """Whether the base model's positions count pads: it is given no positions, and adds none by distance."""
    biased = all(module.linear_attention.equation.bias for module in converted(model).values())
    return not biased and "position_ids" not in signature(model.forward).parameters


def unpadded(model: PreTrainedModel, row: Tensor, pads: int) -> Tensor:
    """Logits `[T, vocab]` that a row `[T]` behind pads must have: those of the row alone or, of a model whose
    positions count pads, those of the row behind as many pads of other tokens.
    """
    pads = pads if counts_pads(model) else 0
    ids = torch.cat([(row[:1] + 1).expand(pads) % model.config.get_text_config().vocab_size, row])
    mask = torch.arange(len(ids), device=row.device) >= pads
    return forward(model, ids[None], mask=mask[None].long())[0, pads:]


def run(model: PreTrainedModel, rows: Tensor, pieces: list[int]) -> tuple[Tensor, Cache]:
    """Logits of rows that are fed piece by piece, and the cache after them."""
    cache = DynamicCache(config=model.config)
    return torch.cat([forward(model, part, cache) for part in rows.split(pieces, 1)], 1), cache


def rounding_noise(model: PreTrainedModel, rows: Tensor) -> tuple[float, float]:
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
        logits = forward(model, together)
        alone = torch.cat([forward(model, row[None]) for row in together])
        noise = max(noise, difference(alone, logits))
    if logits.isnan().any():
        raise UserError(
            "the model's logits are not numbers (NaN)", "Try another --dtype; else convert again."
        )
    largest = finite_max(logits)
    return max(noise, torch.finfo(model.dtype).eps * largest), largest


def compare_forms(
    model: PreTrainedModel, rows: Tensor, size: int, prefill: Comparison, chunked: Comparison
) -> None:
    """One forward without a cache, and prefills of many lengths, against decoding; then an uneven chunked
    prefill. Prefills shorter than the conv and ones that end at a window's or group's edge are among them.
    """
    length = rows.shape[1]
    full = forward(model, rows)
    decoded, _ = run(model, rows, [1] * length)
    prefill.add(decoded, full)
    for start in {2, 5, size - 1, size, size + 1, 2 * size - 3, 2 * size, 3 * size + 5}:
        if 1 < start < length:
            end = min(start + 8, length)
            logits, _ = run(model, rows[:, :end], [start] + [1] * (end - start))
            prefill.add(logits, decoded[:, :end])
    chunked.add(run(model, rows, list(uneven(length)))[0], decoded)


def uneven(length: int) -> Iterator[int]:
    for piece in cycle(PIECES):
        yield min(piece, length)
        length -= piece
        if length <= 0:
            return


def compare_padding(model: PreTrainedModel, rows: Tensor, size: int, worst: Comparison) -> None:
    """A left-padded batch of rows of different lengths, its prefill and 8 single tokens, against one forward
    of each row alone (see `unpadded`), without a cache.
    """
    steps = 8
    lengths = [n for n in (1, 3, size - 1, size, size + 5, 2 * size + 1) if 1 <= n <= rows.shape[1] - steps]
    alone = [rows[i % 2, : n + steps] for i, n in enumerate(lengths)]
    ids, mask = pad_left([row[:n] for row, n in zip(alone, lengths, strict=True)])
    follow = torch.stack([row[n:] for row, n in zip(alone, lengths, strict=True)])
    cache = DynamicCache(config=model.config)
    outputs = [forward(model, ids, cache, mask)]
    for token in follow.split(1, 1):
        mask = pad(mask, (0, 1), value=1)
        outputs.append(forward(model, token, cache, mask))
    for row, logits in zip(alone, torch.cat(outputs, 1), strict=True):
        pads = len(logits) - len(row)
        worst.add(logits[pads:], unpadded(model, row, pads))


def pad_left(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Ids `[B, T]` of rows `[T_i]`, and the mask `[B, T]` that is 0 on the pads."""
    length = max(map(len, rows))
    ids = torch.stack([pad(row, (length - len(row), 0)) for row in rows])
    mask = torch.stack([torch.arange(length, device=row.device) >= length - len(row) for row in rows])
    return ids, mask.long()


def compare_rollback(model: PreTrainedModel, rows: Tensor, size: int, worst: Comparison) -> bool:
    """Draft tokens, take some back, draft again, take one back and go on with a single token, against a cache
    that saw only the tokens that stayed: logits, and all that the converted layers keep. The drafts cross
    edges of windows and groups. False: the model has layers of its own that cannot take tokens back.
    """
    starts = {max(1, start) for start in (1, size - 2, 2 * size - 3)}
    cases = [(start, 4, rejected) for start in sorted(starts) for rejected in range(5)]
    cases += [(size + 1, size + 5, rejected) for rejected in (1, min(size, ROLLBACK))]
    for start, drafted, rejected in cases:
        kept = start + drafted - rejected
        if start + drafted + 4 > rows.shape[1]:
            continue
        cache = DynamicCache(config=model.config)
        forward(model, rows[:, :start], cache)
        if not cache.is_croppable:
            return False
        cache.activate_past_recording()
        forward(model, rows[:, start : start + drafted], cache)
        cache.crop(-rejected)
        compare_states(cache, run(model, rows[:, :kept], [kept])[1], worst)

        others = rows.flip(0)[:, kept : kept + 4]
        second = forward(model, others[:, :3], cache)
        cache.crop(-1)
        logits = torch.cat([second[:, :2], forward(model, others[:, 3:], cache)], 1)
        stayed = torch.cat([rows[:, :kept], others[:, :2], others[:, 3:]], 1)
        expected, fresh = run(model, stayed, [stayed.shape[1]])
        worst.add(logits, expected[:, -3:])
        compare_states(cache, fresh, worst)
    return True


def compare_states(cache: Cache, fresh: Cache, worst: Comparison) -> None:
    for layer, expected in zip(cache.layers, fresh.layers, strict=True):
        if isinstance(layer, LinearCacheLayer):
            for name, tensor in vars(expected.state).items():
                if tensor.numel():
                    worst.add(getattr(layer.state, name), tensor)


def greedy_mismatches(
    model: PreTrainedModel, texts: list[list[int]], first: int, max_new: int
) -> list[dict[str, Any]]:
    """Where greedy decoding with a cache chose another token than one forward without a cache over its text.

    Both see the same left-padded batch: a fault with pads is the affair of another check.

    Returns:
        `prompt` (counted from `first`), `position` (tokens generated before it), and `margin`: how far below
        the best logit of the forward without a cache the chosen token's lies, which is the difference of the
        top two where these two were swapped.
    """
    ids, mask = pad_left([torch.tensor(text, device=model.device) for text in texts])
    length, cache, token = ids.shape[1], DynamicCache(config=model.config), ids
    for step in range(max_new):
        mask = mask if step == 0 else pad(mask, (0, 1), value=1)
        token = forward(model, token, cache, mask)[:, -1:].argmax(-1)
        ids = torch.cat([ids, token], 1)
    logits = forward(model, ids[:, :-1], None, mask)[:, length - 1 :]
    chosen = ids[:, length:]
    margin = logits.amax(-1) - logits.gather(-1, chosen[..., None]).squeeze(-1)
    return [
        {"prompt": first + row, "position": position, "margin": margin[row, position].item()}
        for row, position in (logits.argmax(-1) != chosen).nonzero().tolist()
    ]
