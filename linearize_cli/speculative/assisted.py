"""Speculative decoding with two models, by transformers' assisted generation, and its expected speedup.

One model, the drafter, proposes a few tokens in a row. The other, the target, verifies them in one forward.
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
from linearize_cli.models.positions import last_position
from linearize_cli.speculative.decode import Step
from linearize_cli.speculative.pairs import Pair

DRAFTED = 5  # tokens that the drafter proposes for each forward of the target


class Steps(BaseStreamer):
    """A streamer that turns the output of transformers' `generate` into a `Step` for each forward of the
    target model.

    Attributes:
        report: called with each step.
        drafted: the number of drafted tokens among the tokens that the current forward reads.
        known: the number of tokens that the next forward reads before the drafted ones: the prompt, then 1.
            None before the prompt was seen.
    """

    def __init__(self, report: Callable[[Step], None]):
        self.report, self.drafted = report, 0
        self.known: int | None = None  # tokens that the target's next forward reads besides the drafted ones

    def before_forward(self, module: PreTrainedModel, args: tuple, kwargs: dict) -> None:
        """Count the drafted tokens that the target is about to read. This is a forward pre-hook."""
        self.drafted = kwargs["input_ids"].shape[1] - self.known

    def put(self, value: Tensor) -> None:
        """Report the new tokens of one forward as a step. The first call gets the prompt, and reports
        nothing.
        """
        if self.known is None:
            self.known = value.shape[-1]
            return
        self.known, tokens = 1, value.flatten().tolist()
        self.report(Step([tokens], [len(tokens) - 1], self.drafted + 1))

    def end(self) -> None:
        """Do nothing at the end of the text, because all steps are reported already."""


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
    """Continue a prompt with the target of a pair. Its drafter proposes tokens.

    Greedy tokens are those of the target alone. Sampled tokens follow the target's distribution and use
    torch's global generator.

    Args:
        prompt: at least one token.
        max_new: the most tokens to generate.
        drafted: tokens that the drafter proposes for each forward of the target.
        temperature: 0 is greedy.
        stop: tokens that end the text.
        report: called with each step as it is made.

    Returns:
        A step for each forward of the target. Its `nodes` is the number of drafted tokens plus 1.

    Raises:
        UserError: the prompt and the new tokens exceed the positions of one of the models.
    """
    for model in (pair.target, pair.drafter):
        limit = last_position(model)
        if limit is not None and len(prompt) + max_new > limit:
            what = (
                f"{len(prompt)} prompt tokens and {max_new} new ones exceed the {limit} positions of "
                f"{type(model).__name__}"
            )
            raise UserError(what, "Shorten the prompt, or pass a smaller --max-new.")
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    target = GenerationConfig(
        max_new_tokens=max_new,
        eos_token_id=list(stop) or None,
        pad_token_id=stop[0] if stop else None,  # another token in the prompt would be taken for padding
        use_cache=True,
        **sampling,
    )
    drafter = GenerationConfig(
        num_assistant_tokens=drafted,
        num_assistant_tokens_schedule="constant",
        assistant_confidence_threshold=0.0,
    )
    steps: list[Step] = []

    def record(step: Step) -> None:
        steps.append(step)
        report(step)

    streamer = Steps(record)
    ids = torch.tensor([list(prompt)], device=pair.target.device)
    hook = pair.target.register_forward_pre_hook(streamer.before_forward, with_kwargs=True)
    try:
        with with_config(pair.target, target), with_config(pair.drafter, drafter), torch.inference_mode():
            mask = torch.ones_like(ids)
            pair.target.generate(ids, attention_mask=mask, assistant_model=pair.drafter, streamer=streamer)
    finally:
        hook.remove()
    return steps


@contextmanager
def with_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Replace a model's generation config while the context is open.

    The model's own config may have penalties or filters that would change the text.
    """
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own


def by_depth(steps: Sequence[Step]) -> tuple[list[int], list[int]]:
    """Count the drafted tokens of steps by depth. The first drafted token of a step has depth 1.

    Args:
        steps: results of the target's forwards, each of which verified a chain of drafted tokens.

    Returns:
        Two lists with an entry for each depth: the number of drafted tokens whose predecessors were all
        accepted, and how many of these were accepted themselves.
    """
    chains = [(step.nodes - 1, n) for step in steps for n in step.accepted if n is not None]
    depths = range(1, max((length for length, _ in chains), default=0) + 1)
    reached = [sum(length >= depth and n >= depth - 1 for length, n in chains) for depth in depths]
    return reached, [sum(n >= depth for _, n in chains) for depth in depths]


def acceptance(steps: Sequence[Step]) -> float:
    """Return α, the share of accepted tokens among drafted tokens whose predecessors were all accepted.

    It is 0 if nothing was drafted.
    """
    reached, accepted = by_depth(steps)
    return sum(accepted) / max(sum(reached), 1)


def speedup(alpha: float, drafted: int, cost: float, verification: float = 1.0) -> float:
    """Compute the expected speedup over the target alone (arXiv 2211.17192, theorem 3.8).

    It is `(1 - α^(γ+1)) / ((1 - α) (γ c + v))`, if each drafted token is accepted with probability α.

    Args:
        alpha: α.
        drafted: γ, the number of drafted tokens.
        cost: c, the drafter's time for one token, divided by the target's time for one token.
        verification: v, the target's time for γ + 1 tokens at once, divided by its time for one. The theorem
            has 1.
    """
    return sum(alpha**depth for depth in range(drafted + 1)) / (drafted * cost + verification)


def break_even(drafted: int, cost: float, verification: float = 1.0) -> float | None:
    """Return the smallest acceptance α at which the pair is as fast as its target alone, or None if no α is
    enough.

    Args:
        drafted: γ, the number of drafted tokens for each forward of the target.
        cost: c, the drafter's time for one token, divided by the target's time for one token.
        verification: v, the target's time for γ + 1 tokens at once, divided by its time for one.
    """
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
    """Measure the relative times c and v of `speedup` on this machine, after a prompt.

    The timed forwards of both models take turns, and their medians are used.

    Args:
        prompt: the tokens before the timed ones.
        drafted: γ, the number of drafted tokens.
        repeats: how often each forward is timed.

    Returns:
        c, the drafter's time for one token, and v, the target's time for γ + 1 tokens, both divided by the
        target's time for one token.
    """
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
