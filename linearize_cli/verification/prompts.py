"""The prompts that `verify` continues: built-in ones, or those of a user's file."""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize_cli.data.readers import BadRow, BadRows, Chat, read_jsonl
from linearize_cli.errors import UserError
from linearize_cli.inputs import read_text
from linearize_cli.models.positions import context_length

PROMPTS = (
    "Once upon a time, there was a little girl",
    "The",
    "Water boils when",
    "Tom had a red ball. Sue had a blue kite. One day they met in the park, and Tom asked Sue for her",
    "A list of things to buy: bread, milk, eggs,",
    "The quick brown fox jumps over the lazy dog. The quick brown fox",
    "Dear Sir or Madam, I am writing to ask whether",
    "1, 2, 3, 4,",
)


def tokenize(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str] | None, max_new: int
) -> list[list[int]]:
    """Return the token ids of each prompt, truncated so that `max_new` more tokens fit the context.

    Args:
        prompts: the texts, or None for the built-in ones. A text without tokens is dropped.

    Raises:
        UserError: no prompt has a token, or `max_new` does not fit the context.
    """
    context = context_length(model)
    if not 1 <= max_new < context:
        what = f"cannot generate {max_new} tokens: the model's context is {context}"
        raise UserError(what, f"Pass --max-new between 1 and {context - 1}.")
    texts = [
        tokenizer(text, verbose=False)["input_ids"] for text in (PROMPTS if prompts is None else prompts)
    ]
    texts = [ids[: context - max_new] for ids in texts if ids]
    if not texts:
        raise UserError("the prompts have no token in this tokenizer", "Pass other prompts with --prompts.")
    return texts


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a file: one on each line, or the `text` fields of JSONL.

    Raises:
        UserError: the file cannot be read, has no prompt, or has chats.
    """
    if not path.is_file():
        hint = "Pass a text file with one prompt on each line, or a JSONL file."
        raise UserError(f"no such file of prompts: {path}", hint)
    if path.suffix == ".jsonl":
        try:
            documents = list(read_jsonl(path, BadRows()))
        except BadRow as error:
            raise UserError(error.what, "Correct or remove the line.") from None
        if any(isinstance(document, Chat) for document in documents):
            hint = 'Give each line of the file a text: {"text": "..."}.'
            raise UserError(f"{path} has chats, and --prompts needs plain texts", hint)
        texts = ["".join(document) for document in documents]
    else:
        texts = read_text(path, "Write one prompt on each line, in UTF-8.").splitlines()
    texts = [text for text in texts if text.strip()]
    if not texts:
        hint = 'Write one prompt on each line, or JSONL lines such as {"text": "..."}.'
        raise UserError(f"{path} has no prompt", hint)
    return texts
