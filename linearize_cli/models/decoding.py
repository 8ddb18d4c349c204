"""Decoding of rows of tokens with a cache, and padding of rows of different lengths."""

from collections.abc import Callable, Sequence
from inspect import signature

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel

from linearize_cli.runtime.dispatch import converted


def forward(
    model: PreTrainedModel,
    ids: Tensor,
    cache: Cache | None = None,
    mask: Tensor | None = None,
    last: bool = False,
) -> Tensor:
    """Return the logits `[B, T, vocab]` of token ids `[B, T]`.

    Position ids are passed as `generate` passes them, because some models compute others by default.

    Args:
        ids: the new tokens.
        cache: the cache of the `past` tokens before, which is extended. None: a forward without a cache.
        mask: `[B, past + T]`, 0 at the pads on the left. None means no pads.
        last: True if only the last token's logits are needed. A model with `logits_to_keep` then returns
            `[B, 1, vocab]`, any other model all logits.
    """
    if mask is None:
        past = 0 if cache is None else cache.get_seq_length()
        mask = ids.new_ones(ids.shape[0], past + ids.shape[1])
    inputs = {"attention_mask": mask}
    if "position_ids" in signature(model.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    if last and "logits_to_keep" in signature(model.forward).parameters:
        inputs["logits_to_keep"] = 1
    return model(input_ids=ids, past_key_values=cache, use_cache=cache is not None, **inputs).logits


class Decoder:
    """A model, to be called on token ids `[B, T]` for logits, with or without a cache."""

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def __call__(self, ids: Tensor, cache: Cache | None = None, mask: Tensor | None = None) -> Tensor:
        return forward(self.model, ids, cache, mask)

    def begin(self, ids: Tensor, cache: Cache) -> Tensor:
        """Read the prompt into the cache and return its logits `[B, T, vocab]`.

        A model that can compute the last position alone returns `[B, 1, vocab]`.
        """
        return forward(self.model, ids, cache, last=True)

    def new_cache(self) -> Cache:
        return DynamicCache(config=self.model.config)

    def own(self, cache: Cache) -> Cache:
        """Return the part of the cache for the generated tokens. An encoder-decoder's cache also has one for
        the source text.
        """
        return cache


class SourceDecoder(Decoder):
    """The decoder of an encoder-decoder, for a fixed source text that the encoder reads once.

    A source of one row serves all rows of a batch.

    Args:
        source, source_mask: token ids and mask `[B, T]` of the encoder's input.
    """

    def __init__(self, model: PreTrainedModel, source: Tensor, source_mask: Tensor):
        super().__init__(model)
        self.source_mask = source_mask
        self.encoded = model.get_encoder()(input_ids=source, attention_mask=source_mask)[0]

    def __call__(self, ids: Tensor, cache: Cache | None = None, mask: Tensor | None = None) -> Tensor:
        rows = ids.shape[0]
        return self.model(
            encoder_outputs=(self.encoded.expand(rows, -1, -1),),
            attention_mask=self.source_mask.expand(rows, -1),
            decoder_input_ids=ids,
            decoder_attention_mask=mask,
            past_key_values=cache,
            use_cache=cache is not None,
        ).logits

    begin = __call__

    def new_cache(self) -> Cache:
        config = self.model.get_decoder().config  # the top-level config of T5 counts the encoder's layers
        return EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))

    def own(self, cache: Cache) -> Cache:
        return cache.self_attention_cache


def counts_pads(model: PreTrainedModel) -> bool:
    """Return True if pads on the left shift the positions of the base model's tokens.

    They do if the model takes no position ids and adds no bias by distance.
    """
    biased = all(module.linear_attention.equation.bias for module in converted(model).values())
    return not biased and "position_ids" not in signature(model.forward).parameters


def alone(model: PreTrainedModel, row: Tensor, pads: int) -> tuple[Tensor, Tensor]:
    """Return the input for which the model must give the same logits for a row of tokens as in a left-padded
    batch.

    Args:
        row: token ids `[T]`.
        pads: the number of pads before the row in the batch. If the model's positions count pads
            (`counts_pads`), the result has as many pads, with another token id. Otherwise it has none.

    Returns:
        ids and mask, `[1, T]` or `[1, pads + T]`.
    """
    other = (int(row[0]) + 1) % model.config.get_text_config().vocab_size
    return pad_left([row], other, pads if counts_pads(model) else 0)


def unpadded(model: PreTrainedModel, row: Tensor, pads: int) -> Tensor:
    """Return the logits `[T, vocab]` of a row `[T]` on its own, to compare with the row behind `pads` pads in
    a batch.
    """
    ids, mask = alone(model, row, pads)
    return marked(forward(model, ids, None, mask), mask)[0]


def pad_left(rows: Sequence[Tensor], pad_id: int = 0, extra: int = 0) -> tuple[Tensor, Tensor]:
    """Pad rows of token ids on the left to the longest plus `extra`.

    Args:
        rows: token ids `[T_i]`.
        pad_id: the token id of pads.
        extra: the number of pads beyond the longest row.

    Returns:
        ids `[B, T]` and a mask `[B, T]` that is 0 at the pads.
    """
    return padded(rows, pad_id, extra, lambda missing: (missing, 0))


def pad_right(rows: Sequence[Tensor], pad_id: int = 0, extra: int = 0) -> tuple[Tensor, Tensor]:
    """Pad rows of token ids `[T_i]` on the right to the longest plus `extra`.

    Args:
        rows: token ids `[T_i]`.
        pad_id: the token id of pads.
        extra: the number of pads beyond the longest row.

    Returns:
        ids `[B, T]` and a mask `[B, T]` that is 0 at the pads.
    """
    return padded(rows, pad_id, extra, lambda missing: (0, missing))


def padded(
    rows: Sequence[Tensor], pad_id: int, extra: int, sides: Callable[[int], tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """Pad rows of token ids `[T_i]` to the longest plus `extra`.

    Args:
        pad_id: the token id of pads.
        extra: the number of pads beyond the longest row.
        sides: a function that takes the number of pads of a row, and returns how many go to the left and to
            the right.

    Returns:
        ids `[B, T]` and a mask `[B, T]` that is 0 at the pads.
    """
    around = [sides(max(map(len, rows)) + extra - len(row)) for row in rows]
    ids = [pad(row, pads, value=pad_id) for row, pads in zip(rows, around, strict=True)]
    mask = [pad(torch.ones_like(row), pads) for row, pads in zip(rows, around, strict=True)]
    return torch.stack(ids), torch.stack(mask)


def marked(logits: Tensor, mask: Tensor) -> list[Tensor]:
    """Return the logits `[T_i, vocab]` of each row at the positions where its mask is 1."""
    return [row[own.bool()] for row, own in zip(logits, mask, strict=True)]
