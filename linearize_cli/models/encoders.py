"""The tasks of encoders: masked LM, classification, embedding."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from linearize_cli.errors import UserError
from linearize_cli.methods.recipe import Distill
from linearize_cli.models.batch import IGNORED, Batch, Blocks
from linearize_cli.models.decoding import (
    marked,
    pad_right,
)
from linearize_cli.models.distances import cosine_distance, pool
from linearize_cli.models.sentence_folder import SentenceFolder
from linearize_cli.models.span_corruption import NOISE, row_generator
from linearize_cli.models.task import Task, require


class Encoder(Task):
    """The base of encoder tasks. A row begins with [CLS] and ends with [SEP], if the tokenizer has them."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        super().__init__(model, tokenizer)
        require(self.pad_id, f"{self.kind} has no pad_token_id in its config.json", "Add the tokenizer's.")
        self.first, self.last = tokenizer.cls_token_id, tokenizer.sep_token_id

    def with_special_tokens(self, ids: Tensor) -> Tensor:
        """Return ids `[B, L]` with [CLS] and [SEP] in place of the first and the last token. A token that is
        None is not set.
        """
        ids = ids.clone()
        for place, mark in ((0, self.first), (-1, self.last)):
            if mark is not None:
                ids[:, place] = mark
        return ids

    def ask(self, blocks: Blocks) -> Batch:
        return Batch({"input_ids": self.with_special_tokens(blocks.ids)}, None)

    def read(self, model: PreTrainedModel, rows: Sequence[Tensor], extra: int = 0) -> list[Tensor]:
        return marked(*self.encode(model, rows, extra))

    def encode(self, model: PreTrainedModel, rows: Sequence[Tensor], extra: int) -> tuple[Tensor, Tensor]:
        """Return the logits and the mask `[B, T]` of rows of token ids, padded on the right to the longest
        plus `extra`.
        """
        ids, mask = pad_right(rows, self.pad_id, extra)
        return self.result(model(input_ids=ids, attention_mask=mask)), mask


class MaskedLM(Encoder):
    """Prediction of masked tokens, 15% of a block."""

    auto_class, pipeline = "AutoModelForMaskedLM", "fill-mask"

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        super().__init__(model, tokenizer)
        self.mask_id = require(
            tokenizer.mask_token_id, f"the tokenizer of {self.kind} has no mask token", "Set its mask_token."
        )

    def ask(self, blocks: Blocks) -> Batch:
        ids = self.with_special_tokens(blocks.ids)
        order = torch.stack([torch.rand(ids.shape[1], generator=row_generator(row)) for row in ids])
        order[:, [0, -1]] = 2.0  # the special tokens are never masked
        hidden = torch.zeros_like(order, dtype=torch.bool)
        hidden.scatter_(1, order.argsort(-1)[:, : max(1, round(NOISE * ids.shape[1]))], True)
        hidden = hidden.to(ids.device)
        return Batch({"input_ids": ids.masked_fill(hidden, self.mask_id)}, ids.masked_fill(~hidden, IGNORED))


class SequenceClassification(Encoder):
    """Prediction of a text's class, distilled without labels."""

    auto_class, pipeline = "AutoModelForSequenceClassification", "text-classification"
    answers = False

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        super().__init__(model, tokenizer)
        if model.config.num_labels < 2 or model.config.is_encoder_decoder:
            raise UserError(
                f"{self.kind} with {model.config.num_labels} label(s) cannot be distilled",
                "Choose an encoder with at least two classes.",
            )

    def read(self, model: PreTrainedModel, rows: Sequence[Tensor], extra: int = 0) -> list[Tensor]:
        return list(self.encode(model, rows, extra)[0])


class Embedding(Encoder):
    """An embedding of a text, pooled from the last hidden states of an encoder without a head.

    It has no logits. Where other tasks have logits, such as in `read`, it has hidden states.
    """

    auto_class, pipeline = "AutoModel", "feature-extraction"
    answers, embeds = False, True
    metric = "embedding_distance"

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        super().__init__(model, tokenizer)
        self.folder: SentenceFolder | None = getattr(model, "sentence_folder", None)
        if self.folder is not None:
            self.pooling = self.folder.pooling

    def result(self, output: ModelOutput) -> Tensor:
        """Return the last hidden states `[B, T, width]`."""
        return output.last_hidden_state

    def observe(self, model: nn.Module, blocks: Blocks | Tensor) -> Tensor:
        """Return the embeddings `[B, width]` in fp32."""
        inputs = self.batch(blocks).inputs
        states = self.result(model(**inputs)).float()
        return pool(states, inputs.get("attention_mask"), self.pooling)

    def distance(self, teacher: Tensor, student: Tensor) -> float:
        """Return 1 - cosine of the embeddings, averaged over the texts."""
        return cosine_distance(teacher, student).item()

    @classmethod
    def loss_weights(cls, distill: Distill) -> Distill:
        """Return the options without the KL, for which there are no logits.

        Without weights of their own, the errors of the hidden states and of the embeddings count equally.
        """
        own = {} if distill.hidden or distill.embedding else {"hidden": 1.0, "embedding": 1.0}
        return distill.model_copy(update={"kl": 0.0, **own})

    def save(self, folder: Path) -> None:
        """Copy the files of sentence-transformers, if the base model has them."""
        if self.folder is not None:
            self.folder.copy_to(folder)

    def last_logits(self, model: PreTrainedModel, row: Tensor) -> Tensor:
        """Return the embedding `[width]` of a row."""
        (states,) = self.read(model, [row])
        return pool(states[None], None, self.pooling)[0]
