"""How a model continues rows of tokens, and rows of different lengths in one batch."""

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
    """Logits `[B, T, vocab]` of ids `[B, T]`; mask `[B, past + T]`, 0 for the pads on the left, None: no pads.
    `last`: only the last token's are wanted, and a model that can leaves the others out.

    Positions are given as `generate` gives them: what some models make of none is not what they make of these.
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
    """Continues rows of tokens, with a cache or without one."""

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def __call__(self, ids: Tensor, cache: Cache | None = None, mask: Tensor | None = None) -> Tensor:
        return forward(self.model, ids, cache, mask)

    def begin(self, ids: Tensor, cache: Cache) -> Tensor:
        """Logits of the first tokens, `[B, T, vocab]`, or of the last of them alone where the model can say only
        these, `[B, 1, vocab]`.
        """
        return forward(self.model, ids, cache, last=True)

    def new_cache(self) -> Cache:
        return DynamicCache(config=self.model.config)

    def own(self, cache: Cache) -> Cache:
        """The part of the cache that holds the decoder's own tokens."""
        return cache


class SourceDecoder(Decoder):
    """The decoder of an encoder-decoder beside a source that was read once; a source of one row serves all."""

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
        config = self.model.get_decoder().config  # the model's own counts the encoder's layers, in T5
        return EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))

    def own(self, cache: Cache) -> Cache:
        return cache.self_attention_cache


def counts_pads(model: PreTrainedModel) -> bool:
    """Whether the base model's positions count pads: it is given no positions, and adds none by distance."""
    biased = all(module.linear_attention.equation.bias for module in converted(model).values())
    return not biased and "position_ids" not in signature(model.forward).parameters


def alone(model: PreTrainedModel, row: Tensor, pads: int) -> tuple[Tensor, Tensor]:
    """Ids and mask of a row `[T]` that must read as the same row behind pads: the row by itself or, of a model
    whose positions count pads, behind as many pads of other tokens.
    """
    other = (int(row[0]) + 1) % model.config.get_text_config().vocab_size
    return pad_left([row], other, pads if counts_pads(model) else 0)


def unpadded(model: PreTrainedModel, row: Tensor, pads: int) -> Tensor:
    """Logits `[T, vocab]` that a row `[T]` behind pads must have."""
    ids, mask = alone(model, row, pads)
    return marked(forward(model, ids, None, mask), mask)[0]


def pad_left(rows: Sequence[Tensor], pad_id: int = 0, extra: int = 0) -> tuple[Tensor, Tensor]:
    """Ids `[B, T]` of rows `[T_i]`, and the mask `[B, T]` that is 0 on the pads."""
    return padded(rows, pad_id, extra, lambda missing: (missing, 0))


def pad_right(rows: Sequence[Tensor], pad_id: int = 0, extra: int = 0) -> tuple[Tensor, Tensor]:
    """As `pad_left`, with the pads behind the rows."""
    return padded(rows, pad_id, extra, lambda missing: (0, missing))


def padded(
    rows: Sequence[Tensor], pad_id: int, extra: int, sides: Callable[[int], tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    around = [sides(max(map(len, rows)) + extra - len(row)) for row in rows]
    ids = [pad(row, pads, value=pad_id) for row, pads in zip(rows, around, strict=True)]
    mask = [pad(torch.ones_like(row), pads) for row, pads in zip(rows, around, strict=True)]
    return torch.stack(ids), torch.stack(mask)


def marked(logits: Tensor, mask: Tensor) -> list[Tensor]:
    """The logits of each row where its mask is 1."""
    return [row[own.bool()] for row, own in zip(logits, mask, strict=True)]
