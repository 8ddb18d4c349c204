"""Greedy decoding with a cache, against one forward without a cache and against speculation, token by token."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from linearize_cli.models.tasks import Task
from linearize_cli.speculative.decode import written
from linearize_cli.verification.check import FAIL, OK, TIE, Finding, Line, Subject
from linearize_cli.verification.speculation import Speculation

BATCH = 8  # prompts decoded together
TIES = 10  # times the noise: the top two logits are one


def greedy(subject: Subject) -> Finding:
    """The first mismatch, and whether all of them are ties."""
    speculation, cached, drafted = subject.speculation, [], []
    for first in range(0, len(subject.texts), BATCH):
        part = subject.texts[first : first + BATCH]
        cached += uncached_mismatches(subject.task, subject.model, part, first, subject.max_new)
        if speculation is not None:
            drafted += speculative_mismatches(subject.task, speculation, part, first, subject.max_new)
    count = len(subject.texts) * subject.max_new
    limit = TIES * subject.noise
    lines = [line(f"{len(cached)} of {count:,} tokens differ from those without a cache", cached, limit)]
    if speculation is None:
        lines.append(Line("greedy", f"no speculation: {subject.no_tree}"))
    else:
        said = f"{len(drafted)} of {len(subject.texts)} prompts differ, drafted by {speculation.name}"
        lines.append(line(said, drafted, TIES * subject.target_noise))
    mismatches = cached + drafted
    data = {
        "prompts": len(subject.texts),
        "tokens": count,
        "mismatches": len(mismatches),
        "first_divergence": mismatches[0] if mismatches else None,
        "draft": speculation and speculation.name,
    }
    return Finding({"greedy": data}, lines, {"greedy": limit})


def line(said: str, mismatches: list[dict[str, Any]], limit: float) -> Line:
    tied = all(mismatch["margin"] < limit for mismatch in mismatches)
    verdict = OK if not mismatches else TIE if tied else FAIL
    return Line("greedy", said, f"margin {limit:.1e}", verdict)


def decoded(
    task: Task, model: PreTrainedModel, texts: Sequence[Sequence[int]], max_new: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Plain greedy decoding: ids `[B, L + max_new]`, their mask without the last, L, and how far apart the top two
    logits are of each new token, `[B, max_new]`.
    """
    decoder, ids, mask = task.start(model, [torch.tensor(text, device=model.device) for text in texts])
    length, cache, token, margins = ids.shape[1], decoder.new_cache(), ids, []
    for step in range(max_new):
        mask = mask if step == 0 else pad(mask, (0, 1), value=1)
        logits = decoder(token, cache, mask)[:, -1]
        token, top = logits.argmax(-1, keepdim=True), logits.topk(2).values
        margins.append(top[:, 0] - top[:, 1])
        ids = torch.cat([ids, token], 1)
    return ids, mask, length, torch.stack(margins, 1)


def uncached_mismatches(
    task: Task, model: PreTrainedModel, texts: list[list[int]], first: int, max_new: int
) -> list[dict[str, Any]]:
    """Where plain decoding chose another token than one forward without a cache over its text.

    Both see the same padded batch: a fault with pads is the affair of another check.

    Returns:
        `prompt` (counted from `first`), `position` (tokens generated before it), and `margin`: how far below
        the best logit of the forward without a cache the chosen token's lies, which is the difference of the
        top two where these two were swapped.
    """
    ids, mask, length, _ = decoded(task, model, texts, max_new)
    decoder, _, _ = task.start(model, [torch.tensor(text, device=model.device) for text in texts])
    logits, chosen = decoder(ids[:, :-1], None, mask)[:, length - 1 :], ids[:, length:]
    margin = logits.amax(-1) - logits.gather(-1, chosen[..., None]).squeeze(-1)
    differing = (logits.argmax(-1) != chosen).nonzero().tolist()
    return [mismatch(first + row, place, margin[row, place]) for row, place in differing]


def speculative_mismatches(
    task: Task, speculation: Speculation, texts: list[list[int]], first: int, max_new: int
) -> list[dict[str, Any]]:
    """As `uncached_mismatches`, of speculative decoding: each prompt's first token that is not the plain one. What
    follows it is another text.
    """
    plain, _, length, margins = decoded(task, speculation.target, texts, max_new)
    found = []
    for row, tokens in enumerate(speculated(speculation, texts, max_new)):
        expected = plain[row, length:].tolist()
        place = next(
            (i for i, pair in enumerate(zip(tokens, expected, strict=True)) if len({*pair}) > 1), None
        )
        if place is not None:
            found.append(mismatch(first + row, place, margins[row, place]))
    return found


def speculated(speculation: Speculation, texts: list[list[int]], max_new: int) -> list[list[int]]:
    """The new tokens of each text."""
    parts = [texts] if speculation.batched else [[text] for text in texts]
    return [row for part in parts for row in written(speculation.run(part, max_new))]


def mismatch(prompt: int, position: int, margin: Tensor) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "position": position,
        "margin": margin.nan_to_num(nan=torch.inf).clamp_max(1e30).item(),
    }
