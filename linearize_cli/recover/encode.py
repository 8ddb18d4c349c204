"""Documents as tokens: text by the tokenizer, chats by its chat template."""

import re
from collections.abc import Iterator

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from linearize_cli.errors import UserError
from linearize_cli.recover.read import Chat, Document

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # what transformers looks for

# Token ids, and for each 1 if it counts as something to learn to say.
Tokens = tuple[list[int], list[int]]


def encode(document: Document, tokenizer: PreTrainedTokenizerBase) -> Iterator[Tensor]:
    """A document a piece at a time, from its BOS on if there is one: `[3, n]` int64, the rows being the ids, 1 for
    a token that counts as something to learn to say, and 1 for the document's first.

    Raises:
        UserError: the tokenizer has no chat template for a chat, or the template refuses it.
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


def chat_tokens(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> Iterator[Tokens]:
    if not tokenizer.chat_template:
        raise UserError(
            "the data holds chats (`messages`), and the model's tokenizer has no chat template",
            "Use data with a `text` field, or a model that was trained on chats.",
        )
    marks = marks_assistant(tokenizer)
    try:
        read = tokenizer.apply_chat_template(
            list(chat),
            return_dict=True,
            return_assistant_tokens_mask=marks,
            tokenizer_kwargs={"verbose": False},
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise UserError(
            f"the model's chat template refuses a chat: {error}", f"Mend or remove it: {str(chat)[:100]}"
        ) from None
    ids = read["input_ids"]
    counted = read["assistant_masks"] if marks else [1] * len(ids)
    bos = [] if tokenizer.bos_token_id in (None, *ids[:1]) else [tokenizer.bos_token_id]
    yield bos + ids, [0] * len(bos) + counted


def marks_assistant(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template says which tokens are the assistant's."""
    return bool(tokenizer.chat_template and GENERATION.search(tokenizer.get_chat_template()))
