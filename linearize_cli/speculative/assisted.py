"""Assisted generation of transformers, step by step: one model drafts a chain, the other verifies it. And what such a
pair gains, by its acceptance and its costs.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from linearize_cli.errors import UserError
from linearize_cli.models.decoding import forward
from linearize_cli.models.tasks import last_position
from linearize_cli.speculative.decode import Step
from linearize_cli.speculative.pairs import Pair

DRAFTED = 5  # tokens that the drafter writes for a forward of the target


class Steps(BaseStreamer):
    """Makes steps of what transformers streams: the prompt first, then the tokens that each forward gave."""

    def __init__(self, report: Callable[[Step], None]):
        self.report, self.drafted = report, 0
        self.known: int | None = None  # tokens beside the drafted ones that the target's next forward reads

    def before_forward(self, module: PreTrainedModel, args: tuple, kwargs: dict) -> None:
        self.drafted = kwargs["input_ids"].shape[1] - self.known

    def put(self, value: Tensor) -> None:
        if self.known is None:
            self.known = value.shape[-1]
            return
        self.known, tokens = 1, value.flatten().tolist()
        self.report(Step([tokens], [len(tokens) - 1], self.drafted + 1))

    def end(self) -> None: ...


def assisted(
    pair: Pair,
    prompt: Sequence[int],
    max_new: int,
    *,
    drafted: int = DRAFTED,
    temperature: float = 0.0,
    stop: Sequence[int] = (),
    report: Callable[[Step], None] = lambda step: None,
) -> list[Step]:
    """Continue a prompt with the target of a pair. The tokens are those of the target alone: greedily the very same,
    sampled (torch's global generator) of the same distribution.

    Args:
        prompt: of at least one token.
        max_new: tokens to generate, fewer where one of `stop` ends them.
        drafted: tokens that the drafter writes for a forward of the target.
        temperature: 0 is greedy.
        report: called with each step as it comes.

    Returns:
        A step for each forward of the target; `nodes` counts the last token and the drafted ones.

    Raises:
        UserError: the prompt and the new tokens are more than one of the models has positions for.
    """
    for model in (pair.target, pair.drafter):
        limit = last_position(model)
        if limit is not None and len(prompt) + max_new > limit:
            what = (
                f"{len(prompt)} tokens and {max_new} new ones: {type(model).__name__} has {limit} positions"
            )
            raise UserError(what, "Shorten the prompt, or pass a smaller --max-new.")
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    target = GenerationConfig(
        max_new_tokens=max_new,
        eos_token_id=list(stop) or None,
        pad_token_id=stop[0] if stop else None,  # another would be taken for pads where the prompt has it
        use_cache=True,
        **sampling,
    )
    drafter = GenerationConfig(
        num_assistant_tokens=drafted,
        num_assistant_tokens_schedule="constant",
        assistant_confidence_threshold=0.0,
    )
    steps: list[Step] = []

    def took(step: Step) -> None:
        steps.append(step)
        report(step)

    streamer = Steps(took)
    ids = torch.tensor([list(prompt)], device=pair.target.device)
    hook = pair.target.register_forward_pre_hook(streamer.before_forward, with_kwargs=True)
    try:
        with generating_by(pair.target, target), generating_by(pair.drafter, drafter), torch.inference_mode():
            mask = torch.ones_like(ids)
            pair.target.generate(ids, attention_mask=mask, assistant_model=pair.drafter, streamer=streamer)
    finally:
        hook.remove()
    return steps


@contextmanager
def generating_by(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """While open, the config is in the place of the model's own, whose penalties and cuts would change what it
    writes.
    """
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own


def by_depth(steps: Sequence[Step]) -> tuple[list[int], list[int]]:
    """Of chains: how many drafted tokens were reached by verification at each depth, all before them being accepted,
    and how many of these were accepted.
    """
    chains = [(step.nodes - 1, n) for step in steps for n in step.accepted if n is not None]
    depths = range(1, max((length for length, _ in chains), default=0) + 1)
    reached = [sum(length >= depth and n >= depth - 1 for length, n in chains) for depth in depths]
    return reached, [sum(n >= depth for _, n in chains) for depth in depths]


def acceptance(steps: Sequence[Step]) -> float:
    """α: the share of the tokens reached that were accepted; 0 where none was drafted."""
    reached, accepted = by_depth(steps)
    return sum(accepted) / max(sum(reached), 1)


def speedup(alpha: float, drafted: int, cost: float, verification: float = 1.0) -> float:
    """Tokens a second against the target alone (arXiv 2211.17192, theorem 3.8), each drafted token being accepted with
    probability α: `(1 - α^(γ+1)) / ((1 - α) (γ c + v))`.

    Args:
        drafted: γ.
        cost: c, the drafter's time for a token in forwards of the target.
        verification: v, the target's time for γ + 1 tokens at once in forwards of one; the theorem has 1.
    """
    return sum(alpha**depth for depth in range(drafted + 1)) / (drafted * cost + verification)


def break_even(drafted: int, cost: float, verification: float = 1.0) -> float | None:
    """The α from which on a pair is faster than its target alone; None: no α is enough."""
    if speedup(1.0, drafted, cost, verification) < 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if speedup(middle, drafted, cost, verification) >= 1 else (middle, high)
    return high


@torch.inference_mode()
def measured_costs(
    pair: Pair, prompt: Sequence[int], drafted: int = DRAFTED, repeats: int = 15
) -> tuple[float, float]:
    """c and v of `speedup` behind a prompt, on this machine: medians, the forwards taken in turn."""
    ids = torch.tensor([list(prompt)], device=pair.target.device)
    runs = [(pair.target, 1), (pair.drafter, 1), (pair.target, drafted + 1)]
    caches = [DynamicCache(config=model.config) for model, _ in runs]
    for (model, _), cache in zip(runs, caches, strict=True):
        forward(model, ids, cache)
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for (model, count), cache, own in zip(runs, caches, seconds, strict=True):
            started = time.perf_counter()
            forward(model, ids[:, :1].expand(-1, count), cache)[0, -1, 0].item()
            own.append(time.perf_counter() - started)
    one, draft, verified = map(median, seconds)
    return draft / one, verified / one
