"""Tuning of Medusa heads: their acceptance on held-out text, the cost of a step on this machine, and the best
tree.
"""

import time

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearize_cli.speculative.decode import speculate, written
from linearize_cli.speculative.drafts import NoDraft
from linearize_cli.speculative.medusa import MedusaHeads, last_hidden
from linearize_cli.speculative.trees import NODES, Choices, likeliest, optimised

ROWS = 32  # number of held-out prompts
PROMPT, CONTINUED = 64, 128  # the most tokens of a prompt, and of its continuation
RANKS = 10  # candidates of each head whose acceptance is measured
SIZES = (1, 2, 4, 8, 16, 32, NODES)  # nodes of the trees whose cost is measured
REPEATS = 20  # timed steps of each tree
WARM_UP = 3  # untimed steps, including the prompt's forward


def tune(model: PreTrainedModel, heads: MedusaHeads, blocks: Tensor) -> dict[int, float]:
    """Measure how often each candidate of the heads is right, choose the fastest tree, and store both in the
    heads.

    Args:
        heads: the Medusa heads, whose `acceptance` and `tree` are set.
        blocks: `[N, L]`, held-out text as token ids.

    Returns:
        The seconds of a step on this machine, by the number of nodes of its tree.
    """
    given = min(PROMPT, blocks.shape[1] // 2)
    prompts = blocks[:ROWS, :given].to(model.device)
    rows = continued(model, prompts, min(CONTINUED, blocks.shape[1] - given))
    heads.acceptance = acceptance(model, heads, rows, given)
    seconds = step_seconds(model, heads, prompts[0].tolist())
    heads.tree = optimised(heads.acceptance, seconds)
    return seconds


@torch.inference_mode()
def continued(model: PreTrainedModel, prompts: Tensor, new: int) -> Tensor:
    """Return prompts `[B, T]` with greedy continuations of `new` tokens, `[B, T + new]`.

    The model's own text is used because the heads will draft such text.
    """
    rows = written(speculate(model, prompts.tolist(), NoDraft(), new))
    return torch.cat([prompts, torch.tensor(rows, device=prompts.device)], 1)


@torch.inference_mode()
def acceptance(model: PreTrainedModel, heads: MedusaHeads, rows: Tensor, given: int) -> list[list[float]]:
    """Measure how often each candidate is the model's own token.

    Args:
        rows: `[B, T]`, prompts with greedy continuations.
        given: the number of prompt tokens of each row.

    Returns:
        `[k - 1][r]`, the share of positions where the candidate of rank r of head k is right.
    """
    hidden = last_hidden(model, {"input_ids": rows, "use_cache": False}).to(heads.weight.dtype)
    positions = range(given - 1, rows.shape[1] - 1 - len(heads))  # where all heads predict generated tokens
    rates = torch.zeros(len(heads), min(RANKS, heads.output.shape[1]), dtype=torch.float64)
    for position in positions:
        best = heads(hidden[:, position]).topk(rates.shape[1]).indices  # [K, B, ranks]
        answers = rows[:, position + 2 : position + 2 + len(heads)].T  # [K, B]
        rates += (best == answers[..., None]).double().mean(1).cpu()
    return (rates / len(positions)).tolist()


def step_seconds(model: PreTrainedModel, heads: MedusaHeads, prompt: list[int]) -> dict[int, float]:
    """Measure the seconds of a speculative step for trees of several sizes.

    The fastest of several steps is used, because other work on the machine can only slow a step down. A tree
    that was slower than a larger one gets the larger one's time.

    Args:
        heads: the Medusa heads, with their acceptance.
        prompt: the token ids of a prompt.

    Returns:
        The seconds, by the number of nodes of the tree.
    """
    nodes, length = likeliest(heads.acceptance), (len(heads) + 1) * (REPEATS + WARM_UP) + 1
    running = {}
    for size in SIZES:
        drafter = heads.drafter(Choices.of(nodes[: size - 1]))
        running[len(drafter.parents)] = speculate(model, [prompt], drafter, length)
    times: dict[int, list[float]] = {size: [] for size in running}
    for _ in range(WARM_UP + REPEATS):
        for size, steps in running.items():  # in turn, so that a slow moment affects all sizes
            started = time.perf_counter()
            next(steps)
            times[size].append(time.perf_counter() - started)
    fastest = {size: min(own[WARM_UP:]) for size, own in times.items()}
    return {size: min(fastest[other] for other in fastest if other >= size) for size in fastest}
