"""Documents as tokens: text by the tokenizer, chats by its chat template."""

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

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # what transformers looks for

RENDER_SECONDS = 5  # of one chat at most

# Token ids, and for each 1 if it counts as something to learn to say.
Tokens = tuple[list[int], list[int]]


def encode(document: Document, tokenizer: PreTrainedTokenizerBase) -> Iterator[Tensor]:
    """A document a piece at a time, from its BOS on if there is one: `[3, n]` int64, the rows being the ids, 1 for
    a token that counts as something to learn to say, and 1 for the document's first.

    Raises:
        UserError: see `check_chat`.
    """
    first = 1
    for ids, counted in (chat_tokens if isinstance(document, Chat) else text_tokens)(document, tokenizer):
        if ids:
            yield torch.tensor([ids, counted, [first, *[0] * (len(ids) - 1)]])
            first = 0


def text_tokens(document: Document, tokenizer: PreTrainedTokenizerBase) -> Iterator[Tokens]:
    if tokenizer.bos_token_id is not None:
        yield [tokenizer.bos_token_id], [1]
    for piece in document:
        ids = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        yield ids, [1] * len(ids)


def check_chat(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> None:
    """Render a chat by the template of the tokenizer.

    Raises:
        UserError: the tokenizer has no chat template, or the template does not end.
        BadRow: the template refuses the chat.
    """
    if not tokenizer.chat_template:
        raise UserError(
            "the data holds chats (`messages`), and the model's tokenizer has no chat template",
            "Use data with a `text` field, or a model that was trained on chats.",
        )
    what = f"{chat.where}: the model's chat template did not end within {RENDER_SECONDS} seconds"
    try:
        with at_most(
            RENDER_SECONDS, UserError(what, "Correct the chat template in the folder of the model.")
        ):
            tokenizer.apply_chat_template(list(chat), tokenize=False)
    except UserError:
        raise
    except Exception as error:  # a template is code, which may raise anything
        said = f"the model's chat template refuses the chat: {error}"
        raise BadRow(chat.where, said, f"Correct or remove it: {str(chat)[:100]} ...") from None


def chat_tokens(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> Iterator[Tokens]:
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
    """Raise an error if what runs inside takes longer. Only the main thread can be interrupted, and not on Windows."""

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
    """Whether the chat template says which tokens are the assistant's."""
    return bool(tokenizer.chat_template and GENERATION.search(tokenizer.get_chat_template()))
