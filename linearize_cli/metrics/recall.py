"""Recall of facts in the demo's documents: words that only an earlier sentence of the same document
determines.
"""

from collections.abc import Iterable

import torch

from linearize_cli.data.demo_corpus import Document
from linearize_cli.errors import UserError

# Bins of distances in tokens, without the upper end. Longer distances count in the last bin.
DISTANCES = ((0, 32), (32, 64), (64, 128), (128, 256))


@torch.inference_mode()
def recall(model, tokenizer, documents: Iterable[Document], batch_size: int = 16) -> dict:
    """Measure the accuracy of a model's most probable token at the repeated words of documents
    (teacher-forced).

    A word of several tokens counts as recalled if each token is the argmax of the logits one position
    earlier. The distance is the number of tokens from where the word was stated to where it is repeated.

    Args:
        model: a causal language model in evaluation mode, on any device.
        tokenizer: a fast tokenizer, because character offsets are mapped to tokens.
        documents: documents of `linearize_cli.data.demo_corpus`.
        batch_size: documents in one forward, padded on the right.

    Returns:
        {"accuracy": float, "count": int, "by_distance": [{"distance": [lo, hi], "accuracy": float or None,
        "count": int}]}. An accuracy is None if its count is 0.

    Raises:
        UserError: the tokenizer is not a fast one.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"recall needs a tokenizer that reports character offsets; {type(tokenizer).__name__} does not",
            "Save a fast tokenizer (tokenizer.json) in the model's folder.",
        )
    documents, results = list(documents), []
    for first in range(0, len(documents), batch_size):
        results += _batch_recall(model, tokenizer, documents[first : first + batch_size])
    bins = [
        (lo, hi, [right for distance, right in results if _in_bin(distance, lo, hi)]) for lo, hi in DISTANCES
    ]
    return {
        **_score([right for _, right in results]),
        "by_distance": [{"distance": [lo, hi], **_score(rights)} for lo, hi, rights in bins],
    }


def _batch_recall(model, tokenizer, documents: list[Document]) -> list[tuple[int, bool]]:
    """Return a pair for each repeated word: the distance in tokens, and True if it was recalled."""
    rows = tokenizer([document.text for document in documents])
    length = max(map(len, rows["input_ids"]))
    # Pad without the tokenizer, which may pad on the left or have no padding token.
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows["input_ids"]], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows["input_ids"]])
    logits = model(input_ids=ids, attention_mask=mask.to(model.device), use_cache=False).logits
    right = (logits[:, :-1].argmax(-1) == ids[:, 1:]).tolist()
    results = []
    for row, document in enumerate(documents):
        for item in document.recalls:
            start, last = rows.char_to_token(row, item.start), rows.char_to_token(row, item.end - 1)
            distance = start - rows.char_to_token(row, item.previous)
            results.append((distance, all(right[row][start - 1 : last])))
    return results


def _in_bin(distance: int, lo: int, hi: int) -> bool:
    """Return True if a distance belongs to the bin from `lo` to `hi - 1`. The last bin has no upper end."""
    return lo <= distance and (distance < hi or hi == DISTANCES[-1][1])


def _score(rights: list[bool]) -> dict:
    """Return the accuracy and the number of recalled words. The accuracy of an empty list is None.

    Args:
        rights: for each word, True if the model recalled it.
    """
    return {"accuracy": sum(rights) / len(rights) if rights else None, "count": len(rights)}
