"""What heads are worth: how often they are right on text they have not seen, what a step costs here, and the tree
that follows.
"""

import time

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearize_cli.speculative.decode import speculate, written
from linearize_cli.speculative.drafts import NoDraft
from linearize_cli.speculative.medusa import MedusaHeads, last_hidden
from linearize_cli.speculative.trees import NODES, Choices, likeliest, optimised

ROWS = 32  # held-out beginnings
PROMPT, CONTINUED = 64, 128  # their tokens, and those written after them, at most
RANKS = 10  # candidates of a head that are looked at
SIZES = (1, 2, 4, 8, 16, 32, NODES)  # of the trees whose cost is measured
REPEATS = 20  # steps of each
WARM_UP = 3  # the prompt's forward among them


def tune(model: PreTrainedModel, heads: MedusaHeads, blocks: Tensor) -> dict[int, float]:
    """Give heads their `acceptance` and their `tree`, from held-out blocks `[N, L]`.

    Returns:
        Seconds of a step on this machine, by the nodes of its tree.
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
    """Prompts `[B, T]` with what the model writes greedily after them, `[B, T + new]`: what it is asked for later."""
    rows = written(speculate(model, prompts.tolist(), NoDraft(), new))
    return torch.cat([prompts, torch.tensor(rows, device=prompts.device)], 1)


@torch.inference_mode()
def acceptance(model: PreTrainedModel, heads: MedusaHeads, rows: Tensor, given: int) -> list[list[float]]:
    """How often the candidate of rank r of head k is the model's own token, `[k - 1][r]`, over greedily decoded text:
    rows `[B, T]`, of which the first `given` tokens are not the model's.
    """
    hidden = last_hidden(model, {"input_ids": rows, "use_cache": False}).to(heads.weight.dtype)
    places = range(given - 1, rows.shape[1] - 1 - len(heads))  # where all heads' answers are the model's
    rates = torch.zeros(len(heads), min(RANKS, heads.output.shape[1]), dtype=torch.float64)
    for place in places:
        best = heads(hidden[:, place]).topk(rates.shape[1]).indices  # [K, B, ranks]
        answers = rows[:, place + 2 : place + 2 + len(heads)].T  # [K, B]
        rates += (best == answers[..., None]).double().mean(1).cpu()
    return (rates / len(places)).tolist()


def step_seconds(model: PreTrainedModel, heads: MedusaHeads, prompt: list[int]) -> dict[int, float]:
    """Seconds of a speculative step by the nodes of its tree: the fastest of some, for other work on the machine only
    ever adds, and at most those of a larger tree.
    """
    nodes, length = likeliest(heads.acceptance), (len(heads) + 1) * (REPEATS + WARM_UP) + 1
    running = {}
    for size in SIZES:
        drafter = heads.drafter(Choices.of(nodes[: size - 1]))
        running[len(drafter.parents)] = speculate(model, [prompt], drafter, length)
    times: dict[int, list[float]] = {size: [] for size in running}
    for _ in range(WARM_UP + REPEATS):
        for size, steps in running.items():  # in turns, so that a slow moment is not one size's alone
            started = time.perf_counter()
            next(steps)
            times[size].append(time.perf_counter() - started)
    fastest = {size: min(own[WARM_UP:]) for size, own in times.items()}
    return {size: min(fastest[other] for other in fastest if other >= size) for size in fastest}
