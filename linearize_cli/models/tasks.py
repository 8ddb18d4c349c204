"""The tasks of models: causal LM, masked LM, classification, embedding, encoder-decoder.

A task makes inputs and labels from blocks of tokens, computes the logits of rows of tokens, and continues
them. The Auto class that loads a model determines its task.
"""

from collections.abc import Sequence
from itertools import count, takewhile

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize_cli.models.batch import Batch, Blocks, causal_batch
from linearize_cli.models.decoding import (
    Decoder,
    SourceDecoder,
    alone,
    forward,
    marked,
    pad_left,
    pad_right,
    unpadded,
)
from linearize_cli.models.encoders import Embedding, MaskedLM, SequenceClassification
from linearize_cli.models.span_corruption import fill, row_generator, spans
from linearize_cli.models.task import Task, config_value, require
from linearize_cli.runtime.config import PREFIX, auto_class


class CausalLM(Task):
    """Prediction of the next token."""

    auto_class, pipeline = "AutoModelForCausalLM", "text-generation"
    encodes, decodes = False, True

    def ask(self, blocks: Blocks) -> Batch:
        return causal_batch(blocks)

    def read(self, model: PreTrainedModel, rows: Sequence[Tensor], extra: int = 0) -> list[Tensor]:
        ids, mask = pad_left(rows, extra=extra)
        return marked(forward(model, ids, None, mask), mask)

    def last_logits(self, model: PreTrainedModel, row: Tensor) -> Tensor:
        return forward(model, row[None], last=True)[0, -1]

    def start(self, model: PreTrainedModel, texts: Sequence[Tensor]) -> tuple[Decoder, Tensor, Tensor]:
        return Decoder(model), *pad_left(texts)

    def alone(self, model: PreTrainedModel, text: Tensor, pads: int) -> tuple[Decoder, Tensor, Tensor]:
        return Decoder(model), *alone(model, text, pads)

    def read_alone(self, model: PreTrainedModel, row: Tensor, pads: int) -> Tensor:
        return unpadded(model, row, pads)

    def prompt(self, tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        return bos + tokenizer(text, add_special_tokens=False)["input_ids"]

    def given(self, ids: Tensor) -> int:
        return ids.shape[1]


class Seq2SeqLM(Task):
    """Prediction of the missing parts of a text by an encoder-decoder.

    With sentinel tokens the decoder writes the missing spans (T5, arXiv 1910.10683). Without them it writes
    the whole text (BART's infilling, arXiv 1910.13461). Without a mask token it writes the second half of the
    text.
    """

    auto_class, pipeline = "AutoModelForSeq2SeqLM", "text2text-generation"
    decodes = True

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        super().__init__(model, tokenizer)
        missing = f"{self.kind} has no {{}} in its config.json"
        require(self.pad_id, missing.format("pad_token_id"), "Add the tokenizer's.")
        self.start_id = require(
            config_value(model.config, "decoder_start_token_id"),
            missing.format("decoder_start_token_id"),
            "Add it.",
        )
        self.before = [] if tokenizer.cls_token_id is None else [tokenizer.cls_token_id]
        self.after = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.mask_id = tokenizer.mask_token_id
        vocabulary = tokenizer.get_vocab()
        names = takewhile(vocabulary.__contains__, (f"<extra_id_{i}>" for i in count()))
        self.sentinels = [vocabulary[name] for name in names]
        if len(self.sentinels) > 1:
            self.corrupt = self.spans_behind_sentinels
        else:
            self.corrupt = self.halves if self.mask_id is None else self.infilling

    def ask(self, blocks: Blocks) -> Batch:
        ids = blocks.ids
        length = ids.shape[1] - len(self.before) - len(self.after)
        pairs = [self.corrupt(row[:length].tolist(), row_generator(row)) for row in ids]
        source, labels = (
            torch.tensor([[*self.before, *x, *self.after] for x in part], device=ids.device)
            for part in zip(*pairs, strict=True)
        )
        given = pad(labels[:, :-1], (1, 0), value=self.start_id)
        return Batch({"input_ids": source, "decoder_input_ids": given, "use_cache": False}, labels)

    def spans_behind_sentinels(self, tokens: list[int], generator: torch.Generator) -> tuple[list, list]:
        """Return the source and the target of T5: the text with a sentinel in place of each gap, and each gap
        after its sentinel.
        """
        gaps = spans(len(tokens), len(self.sentinels) - 1, generator)
        target = []
        for mark, (start, end) in zip(self.sentinels, gaps, strict=False):
            target += [mark, *tokens[start:end]]
        return fill(tokens, gaps, self.sentinels), [*target, self.sentinels[len(gaps)]]

    def infilling(self, tokens: list[int], generator: torch.Generator) -> tuple[list, list]:
        """Return the source and the target of BART: the text with a mask token in place of each gap, and the
        whole text.
        """
        gaps = spans(len(tokens), len(tokens), generator)
        return fill(tokens, gaps, [self.mask_id] * len(gaps)), tokens

    def halves(self, tokens: list[int], generator: torch.Generator) -> tuple[list, list]:
        """Return the first half of the text as the source, and the second half as the target."""
        return tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :]

    def read(self, model: PreTrainedModel, rows: Sequence[Tensor], extra: int = 0) -> list[Tensor]:
        ids, mask = pad_right(rows, self.pad_id, extra)
        return marked(SourceDecoder(model, ids, mask)(ids), mask)

    def start(self, model: PreTrainedModel, texts: Sequence[Tensor]) -> tuple[Decoder, Tensor, Tensor]:
        first = torch.full((len(texts), 1), self.start_id, device=texts[0].device)
        return SourceDecoder(model, *pad_right(texts, self.pad_id)), first, torch.ones_like(first)

    def given(self, ids: Tensor) -> int:
        return 1


TASKS: dict[str, type[Task]] = {
    task.auto_class: task for task in (CausalLM, Seq2SeqLM, MaskedLM, SequenceClassification, Embedding)
}


def auto_class_of(pipeline: str) -> str | None:
    """Return the name of the Auto class that loads models of a task, or None if there is no such task.

    Args:
        pipeline: the Hub's name of the task.
    """
    return next((name for name, task in TASKS.items() if task.pipeline == pipeline), None)


def task_class(model: PreTrainedModel) -> type[Task]:
    """Return the task class of a model, softmax or linearized. An unknown class counts as a causal language
    model.
    """
    return TASKS.get(auto_class(type(model).__name__.removeprefix(PREFIX)), CausalLM)


def task_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Task:
    """Return the task of a model with its tokenizer.

    Raises:
        UserError: the model or the tokenizer lacks something that the task needs.
    """
    return task_class(model)(model, tokenizer)
