"""The measurement `speed`: speculative against plain decoding, in tokens per step and tokens per second."""

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from transformers import GenerationConfig

from linearize_cli.metrics.memory import saved_bytes_per_token, state_bytes
from linearize_cli.metrics.timing import one_thread
from linearize_cli.speculative.decode import Step
from linearize_cli.tables import size
from linearize_cli.verification.check import Finding, Line, Subject, not_checked
from linearize_cli.verification.greedy import decoded

SINGLE, TOGETHER = 5, 8  # number of prompts decoded one by one, and in one batch

Texts = Sequence[Sequence[int]]


def speed(subject: Subject) -> Finding:
    """Time `generate`, a plain loop and speculation on one thread, for single prompts and for one batch.

    Each prompt is decoded in all three ways in turn. Times of single prompts are medians over the prompts.
    """
    speculation = subject.speculation
    if speculation is None:
        return not_checked("speed", subject.no_tree)
    ways = {"generate": generated, "loop": looped, "speculative": speculated}
    steps: list[Step] = []

    def timed(name: str, texts: Texts) -> float:
        started = time.perf_counter()
        found = ways[name](subject, texts)
        took = time.perf_counter() - started
        if name == "speculative" and len(texts) == 1:
            steps.extend(found)
        return took

    singles = [[text] for text in subject.texts[:SINGLE]]
    with one_thread():
        for name in ways:
            timed(name, singles[0])
        steps.clear()
        drafting = -speculation.clock.seconds
        seconds = {name: [] for name in ways}
        for texts in singles:
            for name in ways:
                seconds[name].append(timed(name, texts))
        drafting += speculation.clock.seconds
        together = subject.texts[:TOGETHER] * speculation.batched
        batch = {name: timed(name, together) for name in ("loop", "speculative")} if together else {}
    best = min(("generate", "loop"), key=lambda name: median(seconds[name]))
    acceptance = accepted(steps)
    single = rates(1, subject.max_new, median(seconds[best]), median(seconds["speculative"]))
    rows = [single]
    if batch:
        rows.append(rates(len(together), subject.max_new, *batch.values()))
    cost = acceptance["mean"] / single["ratio"]
    data = {key: single[key] for key in ("plain_tokens_per_s", "speculative_tokens_per_s", "ratio")} | {
        "plain": best,
        "draft": speculation.name,
        "step_cost": cost,
        "draft_share": drafting / sum(seconds["speculative"]),
        "by_batch": rows,
        "state_bytes": state_bytes(subject.model),
        "kv_bytes_per_token": saved_bytes_per_token(subject.model),
    }
    return Finding({"acceptance": acceptance, "speed": data}, lines(acceptance, data))


def rates(batch: int, new: int, plain: float, speculative: float) -> dict[str, Any]:
    """Return tokens per second of plain and speculative decoding, and their ratio.

    Args:
        batch: the number of prompts.
        new: the number of new tokens for each prompt.
        plain, speculative: the seconds of each kind.
    """
    return {
        "batch": batch,
        "plain_tokens_per_s": batch * new / plain,
        "speculative_tokens_per_s": batch * new / speculative,
        "ratio": plain / speculative,
    }


def lines(acceptance: dict[str, Any], data: dict[str, Any]) -> list[Line]:
    """Return the lines that `verify` prints about speculative decoding: acceptance, speed by batch size, and
    memory.
    """
    depths = ", ".join(f"{share:.0%}" for share in acceptance["by_depth"])
    rows = [Line("acceptance", f"{acceptance['mean']:.2f} tokens per step; by depth {depths or '-'}")]
    for row in data["by_batch"]:
        said = f"{row['plain_tokens_per_s']:,.0f} tokens/s plain, {row['speculative_tokens_per_s']:,.0f} speculative"
        rows.append(Line(f"speed, batch {row['batch']}", f"{said}: x {row['ratio']:.2f}"))
    per_token, state = data["kv_bytes_per_token"], data["state_bytes"]
    more = f"; softmax attention would keep {size(per_token)} per token"
    return [*rows, Line("memory", f"{size(state)} of state{more}")]


def sentence(report: dict[str, Any]) -> str | None:
    """Return a sentence that says whether speculation is faster, from a report of `verify`. Return None if it
    was not timed.
    """
    speed = report["speed"]
    if speed is None:
        return None
    mean, cost = report["acceptance"]["mean"], speed["step_cost"]
    pays = "pays" if speed["ratio"] > 1 else "does not pay"
    return (
        f"Speculation ({speed['draft']}) {pays} on this machine: a step takes as long as {cost:.2f} plain tokens "
        f"({speed['draft_share']:.0%} of it is drafting) and emits {mean:.2f} tokens on average."
    )


def generated(subject: Subject, texts: Texts) -> None:
    """Generate exactly `max_new` tokens with `model.generate`."""
    model, ids = subject.speculation.target, torch.tensor(texts, device=subject.model.device)
    config = GenerationConfig(
        max_new_tokens=subject.max_new, min_new_tokens=subject.max_new, do_sample=False, pad_token_id=0
    )
    model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config).tolist()


def looped(subject: Subject, texts: Texts) -> None:
    """Decode `max_new` tokens in a plain loop with a cache, without `generate`."""
    decoded(subject.task, subject.speculation.target, texts, subject.max_new)[0].tolist()


def speculated(subject: Subject, texts: Texts) -> list[Step]:
    """Decode `max_new` tokens with speculation and return its steps."""
    return list(subject.speculation.run(texts, subject.max_new))


def accepted(steps: Sequence[Step]) -> dict[str, Any]:
    """Return how many drafted tokens some steps of speculative decoding accepted. The prompt's own forward is
    not counted.

    Returns:
        mean: tokens emitted per forward of the target, including the token after the accepted path.
        by_depth: the share of steps whose accepted path reaches each depth.
        steps: the number of steps, counted for each row.
    """
    depths = [depth for step in steps for depth in step.accepted if depth is not None]
    count = max(len(depths), 1)
    deepest = max(depths, default=0)
    return {
        "mean": 1 + sum(depths) / count,
        "by_depth": [sum(d >= depth for d in depths) / count for depth in range(1, deepest + 1)],
        "steps": len(depths),
    }
