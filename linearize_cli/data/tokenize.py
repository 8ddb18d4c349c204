"""Tokenization of documents. Chats are rendered by the chat template of the tokenizer."""

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from linearize_cli.data.readers import BadRow, Chat, Document
from linearize_cli.errors import UserError

GENERATION = re.compile(
    r"\{%-?\s*generation\s*-?%\}"
)  # the tag by which transformers finds the assistant's tokens

RENDER_SECONDS = 5  # time limit for the rendering of one chat

# Token ids, and for each of them 1 if it is a training target.
Tokens = tuple[list[int], list[int]]


def encode(document: Document, tokenizer: PreTrainedTokenizerBase) -> Iterator[Tensor]:
    """Yield the tokens of a document in parts, so that a long text is never in memory as a whole.

    The first token is BOS if the tokenizer has one.

    Yields:
        tensors `[3, n]` int64. Row 0 holds the token ids. Row 1 is 1 where a token is a training target. Row
        2 is 1 at the first token of the document.

    Raises:
        UserError: the document is a chat, and the tokenizer has no chat template or it does not finish in
            time.
        BadRow: the chat template refuses the chat.
    """
    first = 1
    for ids, counted in (chat_tokens if isinstance(document, Chat) else text_tokens)(document, tokenizer):
        if ids:
            yield torch.tensor([ids, counted, [first, *[0] * (len(ids) - 1)]])
            first = 0


def text_tokens(document: Document, tokenizer: PreTrainedTokenizerBase) -> Iterator[Tokens]:
    """Yield the token ids of a text, part by part, with a list of ones: every token is a training target."""
    if tokenizer.bos_token_id is not None:
        yield [tokenizer.bos_token_id], [1]
    for piece in document:
        ids = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        yield ids, [1] * len(ids)


def check_chat(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the tokenizer's chat template renders a chat.

    Raises:
        UserError: the tokenizer has no chat template, or the template does not finish in time.
        BadRow: the template refuses the chat.
    """
    if not tokenizer.chat_template:
        raise UserError(
            "the data holds chats (`messages`), but the model's tokenizer has no chat template",
            "Use data with a `text` field, or a model that was trained on chats.",
        )
    what = f"{chat.where}: the model's chat template did not finish within {RENDER_SECONDS} seconds"
    try:
        with at_most(RENDER_SECONDS, UserError(what, "Correct the chat template in the model's folder.")):
            tokenizer.apply_chat_template(list(chat), tokenize=False)
    except UserError:
        raise
    except Exception as error:  # a template is code, and may raise any exception
        said = f"the model's chat template refuses the chat: {error}"
        raise BadRow(chat.where, said, f"Correct or remove it: {str(chat)[:100]} ...") from None


def chat_tokens(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> Iterator[Tokens]:
    """Yield the token ids of a chat, and for each of them 1 if it is a training target, else 0.

    Only the assistant's tokens are targets if the chat template marks them. Otherwise all tokens are.
    """
    check_chat(chat, tokenizer)
    marks = marks_assistant(tokenizer)
    read = tokenizer.apply_chat_template(
        list(chat),
        return_dict=True,
        return_assistant_tokens_mask=marks,
        tokenizer_kwargs={"verbose": False},
    )
    ids = read["input_ids"]
    counted = read["assistant_masks"] if marks else [1] * len(ids)
    bos = [] if tokenizer.bos_token_id in (None, *ids[:1]) else [tokenizer.bos_token_id]
    yield bos + ids, [0] * len(bos) + counted


@contextmanager
def at_most(seconds: float, error: Exception) -> Iterator[None]:
    """Raise an error if the code inside the context takes longer than `seconds`.

    There is no time limit outside the main thread or on Windows, where no signal can interrupt the code.

    Args:
        error: the error to raise.
    """

    def stop(*unused: object) -> None:
        raise error

    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def marks_assistant(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return True if the tokenizer has a chat template that marks the tokens of the assistant."""
    return bool(tokenizer.chat_template and GENERATION.search(tokenizer.get_chat_template()))
