"""The base class of the tasks of models (see `tasks`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from linearize_cli.errors import UserError
from linearize_cli.methods.recipe import Distill
from linearize_cli.models.batch import Batch, Blocks
from linearize_cli.models.decoding import (
    Decoder,
)
from linearize_cli.models.distances import divergence
from linearize_cli.runtime.config import PREFIX


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
