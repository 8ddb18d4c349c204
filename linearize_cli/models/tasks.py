"""The tasks of models: causal LM, masked LM, classification, embedding, encoder-decoder.

A task makes inputs and labels from blocks of tokens, computes the logits of rows of tokens, and continues
them. The Auto class that loads a model determines its task.
"""

from collections.abc import Sequence
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from linearize_cli.errors import UserError
from linearize_cli.methods.recipe import Distill
from linearize_cli.models.batch import IGNORED, Batch, Blocks, causal_batch
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
from linearize_cli.models.distances import cosine_distance, divergence, pool
from linearize_cli.models.sentence_folder import SentenceFolder
from linearize_cli.models.span_corruption import NOISE, fill, row_generator, spans
from linearize_cli.runtime.config import PREFIX, auto_class


class MissingEmbedding(UserError):
    """The error of a token id that the tokenizer has, but the model has no embedding for."""


def config_value(config: PreTrainedConfig, name: str) -> Any:
    """Return a value of a config, or of its text model's part. Return None if neither sets it."""
    parts = (config, config.get_text_config(decoder=True))
    return next((value for part in parts if (value := getattr(part, name, None)) is not None), None)


class Task:
    """The task of a model with its tokenizer.

    Attributes:
        auto_class: the Auto class that loads its models.
        pipeline: the Hub's name of the task.
        encodes: True if its attention may be bidirectional.
        decodes: True if it can continue rows of tokens. Otherwise it has no `start`.
        answers: True if text gives labels. Otherwise a model is measured by its distance from the teacher.
        embeds: True if its models give an embedding of each text, and no logits.
        metric: the name of that distance in reports (see `distance`).
        pooling: how hidden states become the embedding of a text, `mean` or `cls`.
        without_embedding: the tokens that the model has no embedding for, as names by token id.
    """

    auto_class: str
    pipeline: str
    encodes = True
    decodes = False
    answers = True
    embeds = False
    metric = "kl"
    pooling = "mean"

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        """Read the special tokens.

        Raises:
            UserError: the model or its tokenizer lacks something that the task needs.
        """
        self.kind = type(model).__name__.removeprefix(PREFIX)
        self.pad_id = config_value(model.config, "pad_token_id")
        self.embeddings = getattr(model.get_input_embeddings(), "num_embeddings", None)
        names = {token: name for name, token in tokenizer.get_vocab().items()}
        self.without_embedding = {
            token: name for token, name in names.items() if self.embeddings and token >= self.embeddings
        }

    def batch(self, blocks: Blocks | Tensor) -> Batch:
        """Return the inputs and labels of blocks. The same row always gives the same inputs and labels.

        Args:
            blocks: blocks, or ids `[B, L]` that are one document each.

        Raises:
            MissingEmbedding: a token has no embedding in the model.
        """
        blocks = blocks if isinstance(blocks, Blocks) else Blocks(blocks)
        self.check_tokens(blocks.ids)
        return self.ask(blocks)

    def check_tokens(self, ids: Tensor) -> None:
        """Check that the model has an embedding for each token of `ids`, of any shape.

        Raises:
            MissingEmbedding: a token has none.
        """
        if self.without_embedding and ids.numel() and (token := int(ids.max())) >= self.embeddings:
            raise MissingEmbedding(
                f"the token {token} ({self.without_embedding.get(token)!r}) has no embedding in the model "
                f"(ids 0 to {self.embeddings - 1})",
                "The tokenizer was extended but the model was not: call resize_token_embeddings and save, or "
                "remove the token from the tokenizer's files.",
            )

    def ask(self, blocks: Blocks) -> Batch:
        """Return the inputs and labels of blocks. Only causal language models use `Blocks.starts` and
        `Blocks.counted`.
        """
        raise NotImplementedError

    def result(self, output: ModelOutput) -> Tensor:
        """Return the tensor that a model computes for its users: the logits `[B, T, vocab]`, or
        `[B, labels]`.
        """
        return output.logits

    def observe(self, model: nn.Module, blocks: Blocks | Tensor) -> Tensor:
        """Return what a student is compared with its teacher by, on blocks of tokens: the log-probabilities
        `[B, T, vocab]`, or `[B, labels]`, in fp32.
        """
        return self.result(model(**self.batch(blocks).inputs)).float().log_softmax(-1)

    def distance(self, teacher: Tensor, student: Tensor) -> float:
        """Return the distance of a student from its teacher: KL(teacher ‖ student), in nats.

        Args:
            teacher, student: the results of `observe`.
        """
        return divergence(teacher, student).item()

    @classmethod
    def loss_weights(cls, distill: Distill) -> Distill:
        """Return the options of distillation with loss weights that suit the task."""
        return distill

    def save(self, folder: Path) -> None:
        """Write the files of an artifact that belong to neither the model nor the tokenizer."""

    def read(self, model: PreTrainedModel, rows: Sequence[Tensor], extra: int = 0) -> list[Tensor]:
        """Return the logits of rows of any lengths, computed in one padded batch.

        Args:
            rows: token ids `[T_i]`.
            extra: the number of pads beyond the longest row.

        Returns:
            the logits of each row, without those of pads: `[T_i, vocab]`, or `[labels]` of a classifier. An
                embedding model gives its hidden states `[T_i, width]` instead.
        """
        raise NotImplementedError

    def last_logits(self, model: PreTrainedModel, row: Tensor) -> Tensor:
        """Return the logits `[vocab]` after the last token of a row, or a classifier's `[labels]`."""
        (logits,) = self.read(model, [row])
        return logits if logits.dim() == 1 else logits[-1]

    def read_alone(self, model: PreTrainedModel, row: Tensor, pads: int) -> Tensor:
        """Return the logits that a row must have in a batch with `pads` pads, computed without the batch."""
        return self.read(model, [row])[0]

    def start(self, model: PreTrainedModel, texts: Sequence[Tensor]) -> tuple[Decoder, Tensor, Tensor]:
        """Prepare the continuation of texts.

        Args:
            texts: token ids `[T_i]`.

        Returns:
            a decoder, the first tokens `[B, T]` that it reads, and their mask `[B, T]`. These are the padded
                texts, or the start token if an encoder has read the texts.
        """
        raise NotImplementedError

    def alone(self, model: PreTrainedModel, text: Tensor, pads: int) -> tuple[Decoder, Tensor, Tensor]:
        """Prepare the continuation of one text as it must be in a batch with `pads` pads.

        Returns:
            a decoder, the first tokens `[1, T]` that it reads, and their mask `[1, T]`.
        """
        return self.start(model, [text])

    def prompt(self, tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
        """Return the token ids of a prompt."""
        return tokenizer(text)["input_ids"]

    def given(self, ids: Tensor) -> int:
        """Return the number of leading tokens in the output of `generate` that were given to it, for input
        ids `[1, T]`.
        """
        raise NotImplementedError


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


def context_length(model: PreTrainedModel) -> int:
    """Return the largest number of tokens in a row.

    It is less than the number of learned positions if some of these are reserved for pads (RoBERTa).
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    for module in model.modules():
        positions = isinstance(module, nn.Embedding) and module is not model.get_input_embeddings()
        if positions and module.num_embeddings == limit and module.padding_idx is not None:
            return limit - module.padding_idx - 1
    return limit


def last_position(model: PreTrainedModel) -> int | None:
    """Return the number of positions that the model has. It cannot read longer rows.

    Return None if the positions are computed (RoPE, ALiBi) or if there are none. A limit exists if they are
    learned or held in a table.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return None
    embeddings = [
        [module.num_embeddings]
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module is not model.get_input_embeddings()
    ]
    sizes = {size for shape in (*embeddings, *(b.shape for b in model.buffers())) for size in shape}
    # Some tables hold a few more rows (OPT's two).
    return context_length(model) if any(limit <= size <= limit + 8 for size in sizes) else None


def reach(model: PreTrainedModel) -> int | None:
    """Return the largest number of tokens that a converted model can read, or None if it has no limit.

    A model with layers that stay softmax is limited to its context, because such a layer may have its own
    table of positions.
    """
    last = last_position(model)
    return context_length(model) if last is None and model.config.linearize["softmax"] else last


def require(token: int | None, what: str, hint: str) -> int:
    """Return a token id.

    Args:
        what, hint: the text of the error.

    Raises:
        UserError: the token id is None.
    """
    if token is None:
        raise UserError(what, hint)
    return token
