"""Recall by distance of any causal language model: what a row told so many tokens ago, and nothing else can say."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize_cli.metrics.predictions import read, tokens_at_once

ROWS = 32  # of one distance
CANDIDATES = 4 * ROWS


@dataclass(frozen=True)
class Probe:
    """Rows `[R, T]` whose last `answers` tokens repeat what was told `distance` tokens before."""

    distance: int
    rows: Tensor
    answers: int


def distances(window: int, longest: int) -> list[int]:
    """Half the window, the window and its doubles, below the `longest` row."""
    found, distance = [], max(window // 2, 8)
    while distance < longest:
        found.append(distance)
        distance *= 2
    return found


def pair_probe(
    vocabulary: Tensor, opening: list[int], distance: int, generator: torch.Generator
) -> Probe | None:
    """Associative recall: a random pair of tokens (key, value), random others without that key, the key again;
    the answer is the value. As in Zoology (arXiv 2312.04927), with one pair asked for.

    Args:
        vocabulary: `[V]`, the tokens to draw from; None is returned of fewer than 3.
        opening: what every text begins with (BOS, or nothing).
    """
    if len(vocabulary) < 3:
        return None
    key = torch.randint(len(vocabulary), (ROWS, 1), generator=generator)
    others = torch.randint(len(vocabulary) - 1, (ROWS, distance - 1), generator=generator)
    value_and_filler = vocabulary[others + (others >= key)]
    told = torch.cat([vocabulary[key], value_and_filler], 1)
    rows = torch.cat([torch.tensor([opening] * ROWS, dtype=torch.long), told, told[:, :2]], 1)
    return Probe(distance, rows, 1)


def passkey_probe(
    tokenizer: PreTrainedTokenizerBase,
    text: Tensor,
    opening: list[int],
    distance: int,
    generator: torch.Generator,
) -> Probe | None:
    """A sentence with a random number, real text, and the sentence again (passkey retrieval, arXiv 2305.16300);
    the answer is the number. None: the tokenizer does not tell numbers apart, or the distance is too short.

    Args:
        text: `[N]` tokens to fill up with.
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
    """The share of rows all of whose answer's tokens the model ranks first, each after the right ones."""
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
    """`{**means by model, by_distance: [{distance, **shares by model}]}`; None without probes."""
    if not probes:
        return None
    parts = []
    for probe in probes:
        parts.append({"distance": probe.distance, **{n: recalled(m, probe) for n, m in models.items()}})
        progress(probe.rows.numel())
    means = {name: sum(part[name] for part in parts) / len(parts) for name in models}
    return {**means, "by_distance": parts}
