"""The check `rows`: each row of a batch gives the same logits as the row alone.

The batches have rows of many lengths, pads in many places, and caches that were reordered or reset.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import GenerationConfig, PreTrainedModel

from linearize_cli.metrics.equivalence import Comparison, compare_batch
from linearize_cli.metrics.selfcheck import TOLERANCE
from linearize_cli.models.decoding import alone, counts_pads, forward, marked, pad_left, pad_right
from linearize_cli.models.tasks import CausalLM
from linearize_cli.verification.check import Finding, Subject, compared, is_linear

SHORT, BEAMS, NEW = 5, 3, 12  # tokens of a short row, number of beams, new tokens of a beam
MANY = 24  # rows of a wide batch


def rows(subject: Subject) -> Finding:
    """Compare the logits of each row of a batch, for batches of several shapes and for beam search, with the
    row alone.
    """
    worst = subject.comparison()
    for compare in (equal_rows, uneven_rows, long_turns):
        compare(subject, worst)
    if isinstance(subject.task, CausalLM):
        for compare in (many_rows, moved_rows, reset_rows, beams):
            compare(subject, worst)
        if subject.no_tree is None:  # recurrent layers of a base model may not follow pads elsewhere
            pads_elsewhere(subject, worst)
    return compared("rows", worst.diff, worst.limit, {"rows": {"max_abs_diff": worst.diff}})


def texts_of(subject: Subject, lengths: tuple[int, ...], new: int) -> tuple[list[Tensor], Tensor]:
    """Return random token ids: texts of the given lengths, and tokens that follow each text.

    Args:
        lengths: the length of each text. Longer ones are cut to what fits the context.
        new: the number of tokens that follow.

    Returns:
        the texts `[T_i]`, and the tokens `[B, new]`.
    """
    longest = max(1, subject.context - new)
    source = subject.random_tokens(len(lengths), max(lengths) + new)
    texts = [row[: min(length, longest)] for row, length in zip(source, lengths, strict=True)]
    return texts, source[:, -new:]


def equal_rows(subject: Subject, worst: Comparison) -> None:
    """Compare a batch of five equally long rows, followed by single tokens, with each row alone.

    Args:
        worst: collects the differences.
    """
    texts, follow = texts_of(subject, (subject.size + 2,) * 5, 4)
    compare_batch(subject.task, subject.model, texts, follow.split(1, 1), worst)


def uneven_rows(subject: Subject, worst: Comparison) -> None:
    """Compare a batch of a short, a long and a short row, followed by single tokens, with each row alone.

    Args:
        worst: collects the differences.
    """
    texts, follow = texts_of(subject, (SHORT, subject.size + 22, SHORT), 6)
    compare_batch(subject.task, subject.model, texts, follow.split(1, 1), worst)


def long_turns(subject: Subject, worst: Comparison) -> None:
    """Compare a padded batch that is continued in several forwards, as a chat is, with each row alone.

    The forwards read many tokens, one token, and a few tokens.

    Args:
        worst: collects the differences.
    """
    turns = [min(2 * subject.size + 3, max(1, subject.context // 3)), 1, 7]
    texts, follow = texts_of(
        subject, (3, subject.size + 5, 9, 3), sum(turns)
    )  # the first row is as long as the last
    if follow.shape[1] + 3 <= subject.context:
        compare_batch(subject.task, subject.model, texts, follow.split(turns, 1), worst)


def many_rows(subject: Subject, worst: Comparison) -> None:
    """Compare some rows of a batch with many rows, in one forward without a cache, with the same rows alone.

    Args:
        worst: collects the differences.
    """
    ids = subject.random_tokens(MANY, min(9, subject.context))
    together = forward(subject.model, ids)
    for row in (0, MANY // 2, MANY - 1):
        worst.add(together[row], forward(subject.model, ids[row, None])[0])


def pads_elsewhere(subject: Subject, worst: Comparison) -> None:
    """Compare rows with pads on the right, and rows with pads between their tokens, with the rows alone.

    Args:
        worst: collects the differences.
    """
    texts, _ = texts_of(subject, (subject.size + 9, SHORT, 3), 4)
    ids, mask = pad_right(texts, extra=2)
    masks = [mask]
    if not counts_pads(subject.model):
        masks.append(mask * (torch.arange(mask.shape[1], device=mask.device) % 4 != 1))
    for own in masks:
        logits = marked(forward(subject.model, ids, None, own), own)
        for row, actual in enumerate(logits):
            worst.add(actual, forward(subject.model, ids[row, own[row].bool()][None])[0])


def moved_rows(subject: Subject, worst: Comparison) -> None:
    """Reorder, repeat and select the rows of a cache, as beam search does, and compare each row with the row
    alone.

    Two tokens are decoded after each change. Changes that a layer of the base model does not support are
    skipped.

    Args:
        worst: collects the differences.
    """
    texts, follow = texts_of(subject, (SHORT, subject.size + 3, 2), 6)
    model = subject.model
    ids, mask = pad_left(texts)
    cache, tokens = subject.task.start(model, texts)[0].new_cache(), follow[:, :0]
    forward(model, ids, cache, mask)
    moves: list[tuple[str, object, list[int]]] = [
        ("reorder_cache", torch.tensor([2, 0, 0]), [2, 0, 0]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2]),
        ("batch_select_indices", torch.tensor([4, 1, 0]), [4, 1, 0]),
    ]
    for step, (name, argument, order) in enumerate(moves):
        if not all(hasattr(layer, name) for layer in cache.layers):
            continue  # recurrent layers of the base model cannot be moved in every way
        getattr(cache, name)(argument)
        texts, tokens, mask = [texts[i] for i in order], tokens[order], mask[order]
        for column in (2 * step, 2 * step + 1):
            new = follow[torch.arange(len(order), device=follow.device) % len(follow), column, None]
            tokens, mask = torch.cat([tokens, new], 1), pad(mask, (0, 1), value=1)
            logits = forward(model, new, cache, mask)[:, -1]
            for row, text in enumerate(texts):
                worst.add(logits[row], read_alone(subject, text, tokens[row], ids.shape[1])[-1])


def read_alone(subject: Subject, text: Tensor, more: Tensor, width: int) -> Tensor:
    """Return the logits `[T, vocab]` of one text and the tokens after it, from a forward without a cache.

    Args:
        text: token ids of the text, without pads.
        more: token ids after it.
        width: the length of the padded text in the batch. If the model's positions count pads, it gets as
            many pads here.
    """
    first, mask = alone(subject.model, text, width - len(text))
    whole = torch.cat([first, more[None]], 1)
    mask = pad(mask, (0, len(more)), value=1)
    return marked(forward(subject.model, whole, None, mask), mask)[0]


def reset_rows(subject: Subject, worst: Comparison) -> None:
    """Decode a batch with a cache, reset the cache, decode another batch with it, and compare each row with
    the row alone.

    The reset is left out for models with softmax layers, because their caches keep their length when reset.

    Args:
        worst: collects the differences.
    """
    texts, follow = texts_of(subject, (subject.size + 3, SHORT), 4)
    cache = subject.task.start(subject.model, texts)[0].new_cache()
    turns, task, model = follow.split(1, 1), subject.task, subject.model
    compare_batch(task, model, texts, turns, worst, cache)
    if all(is_linear(layer) for layer in cache.layers):
        cache.reset()
        compare_batch(task, model, [text.flip(0) for text in reversed(texts)], turns, worst, cache)


@contextmanager
def plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Replace the model's generation config, while the context is open, by one that does not change scores.

    The model's own may change them: forced tokens, penalties, an end-of-text token.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig(
        pad_token_id=0, return_dict_in_generate=True, output_scores=True
    )
    try:
        yield
    finally:
        model.generation_config = own


def beams(subject: Subject, worst: Comparison) -> None:
    """Run beam search with `generate`, and compare the scores of the best beams with those of a forward
    without a cache.

    Args:
        worst: collects the differences.
    """
    model, length = subject.model, min(subject.size + 4, subject.context - NEW)
    if length < 1:
        return
    ids = subject.rows[:1, :length]
    options = dict(num_beams=BEAMS, num_return_sequences=2, length_penalty=0.0, max_new_tokens=NEW)
    with plain_generation(model):
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    new = found.sequences[:, length:]
    logits = forward(model, found.sequences[:, :-1])[:, length - 1 :].float()
    scores = logits.log_softmax(-1).gather(-1, new[..., None]).sum((1, 2))
    # `generate` computes scores in fp32, whatever the model's dtype.
    own = Comparison(max(worst.tolerance, TOLERANCE[torch.float32]), subject.largest)
    own.add(found.sequences_scores / NEW, scores / NEW)
    worst.include(own)
