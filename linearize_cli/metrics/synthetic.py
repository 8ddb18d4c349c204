"""Synthetic recall probes for any causal language model: associative recall and passkey retrieval, by distance."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize_cli.metrics.predictions import read, tokens_at_once

ROWS = 32  # rows for each distance
CANDIDATES = 4 * ROWS  # random numbers, of which ROWS with the same number of tokens are used


@dataclass(frozen=True)
class Probe:
    """Rows of token ids for a recall test. The last `answers` tokens of a row repeat tokens from `distance`
    positions earlier.

    Attributes:
        rows: `[R, T]`.
        answers: the number of tokens to recall at the end of a row.
    """

    distance: int
    rows: Tensor
    answers: int


def distances(window: int, longest: int) -> list[int]:
    """Return the distances in tokens to test recall at: half the window (at least 8), then always twice the
    one before.

    All are below `longest`.
    """
    found, distance = [], max(window // 2, 8)
    while distance < longest:
        found.append(distance)
        distance *= 2
    return found


def pair_probe(
    vocabulary: Tensor, opening: list[int], distance: int, generator: torch.Generator
) -> Probe | None:
    """Build a probe of associative recall, as in Zoology (arXiv 2312.04927), with one query.

    A row has a random key and value, random other tokens without the key, and the key again. The answer is the value.

    Args:
        vocabulary: `[V]`, the tokens to sample from.
        opening: the tokens that every row begins with (BOS, or none).
        distance: tokens from the first pair to the second.

    Returns:
        The probe, or None if the vocabulary has fewer than 3 tokens.
    """
    if len(vocabulary) < 3:
        return None
    key = torch.randint(len(vocabulary), (ROWS, 1), generator=generator)
    others = torch.randint(len(vocabulary) - 1, (ROWS, distance - 1), generator=generator)
    value_and_filler = vocabulary[others + (others >= key)]
    body = torch.cat([vocabulary[key], value_and_filler], 1)
    rows = torch.cat([torch.tensor([opening] * ROWS, dtype=torch.long), body, body[:, :2]], 1)
    return Probe(distance, rows, 1)


def passkey_probe(
    tokenizer: PreTrainedTokenizerBase,
    text: Tensor,
    opening: list[int],
    distance: int,
    generator: torch.Generator,
) -> Probe | None:
    """Build a probe of passkey retrieval (arXiv 2305.16300).

    A row has a sentence with a random number, real text, and the sentence again. The answer is the number.

    Args:
        text: `[N]`, the tokens between the two sentences.
        opening: the tokens that every row begins with (BOS, or none).
        distance: tokens from the first sentence to the second.

    Returns:
        The probe, or None if the tokenizer maps all numbers to the same tokens or the distance is too short.
    """
    numbers = torch.randint(10_000, 100_000, (CANDIDATES,), generator=generator).tolist()
    by_length = defaultdict(list)
    for number in numbers:
        ids = tokenizer(f" The pass key is {number}", add_special_tokens=False)["input_ids"]
        by_length[len(ids)].append(ids)
    said = torch.tensor(max(by_length.values(), key=len)[:ROWS])
    differ = (said != said[:1]).any(0).nonzero()
    missing = distance - said.shape[1]
    if not len(differ) or missing < 0:
        return None
    start = torch.randint(len(text), (len(said), 1), generator=generator)
    filler = text[(start + torch.arange(missing)) % len(text)]
    rows = torch.cat([torch.tensor([opening] * len(said), dtype=torch.long), said, filler, said], 1)
    return Probe(distance, rows, said.shape[1] - int(differ[0]))


@torch.inference_mode()
def recalled(model: PreTrainedModel, probe: Probe) -> float:
    """Return the share of rows where every token of the answer is the model's argmax (teacher-forced)."""
    tokens, right = tokens_at_once(model), 0
    for rows in probe.rows.split(max(1, tokens // probe.rows.shape[1])):
        rows = rows.to(model.device)
        best = torch.cat([logits.argmax(-1) for logits in read(model, rows, tokens)], 1)
        end = rows.shape[1]
        answered = best[:, end - probe.answers - 1 : -1] == rows[:, end - probe.answers :]
        right += int(answered.all(-1).sum())
    return right / len(probe.rows)


def by_distance(
    models: dict[str, PreTrainedModel], probes: list[Probe], progress: Callable[[int], None]
) -> dict | None:
    """Measure the recall of several models on probes of several distances.

    Args:
        models: the models by name.
        progress: called with the number of tokens of each probe.

    Returns:
        `{NAME: mean share, ..., by_distance: [{distance, NAME: share, ...}]}`, or None without probes.
    """
    if not probes:
        return None
    parts = []
    for probe in probes:
        parts.append({"distance": probe.distance, **{n: recalled(m, probe) for n, m in models.items()}})
        progress(probe.rows.numel())
    means = {name: sum(part[name] for part in parts) / len(parts) for name in models}
    return {**means, "by_distance": parts}
