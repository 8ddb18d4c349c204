"""The check `greedy`: greedy decoding with a cache against a forward without a cache, and against
speculation.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from linearize_cli.models.task import Task
from linearize_cli.speculative.decode import written
from linearize_cli.verification.check import FAIL, OK, TIE, Finding, Line, Subject
from linearize_cli.verification.speculation import Speculation

BATCH = 8  # prompts decoded together
TIES = 10  # the top two logits tie if they are closer than this many times the noise


def greedy(subject: Subject) -> Finding:
    """Compare the greedy tokens of cached decoding with those of a forward without a cache, and of
    speculative decoding.

    The check passes as TIE if every token that differs is at a tie of logits.
    """
    speculation, cached, drafted = subject.speculation, [], []
    for first in range(0, len(subject.texts), BATCH):
        part = subject.texts[first : first + BATCH]
        cached += uncached_mismatches(subject.task, subject.model, part, first, subject.max_new)
        if speculation is not None:
            drafted += speculative_mismatches(subject.task, speculation, part, first, subject.max_new)
    count = len(subject.texts) * subject.max_new
    limit = TIES * subject.noise
    lines = [line(f"{len(cached)} of {count:,} tokens differ from a forward without a cache", cached, limit)]
    if speculation is None:
        lines.append(Line("greedy", f"no speculation: {subject.no_tree}"))
    else:
        said = f"{len(drafted)} of {len(subject.texts)} prompts differ with drafts by {speculation.name}"
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
    """Return a line of the printed table: OK without mismatches, TIE if all are at tied logits, else FAIL.

    Args:
        said: the text of the line.
        mismatches: the records of tokens that differ (see `mismatch`). Their margin is the gap between two
            logits.
        limit: the gap below which two logits count as tied.
    """
    tied = all(mismatch["margin"] < limit for mismatch in mismatches)
    verdict = OK if not mismatches else TIE if tied else FAIL
    return Line("greedy", said, f"margin {limit:.1e}", verdict)


def decoded(
    task: Task, model: PreTrainedModel, texts: Sequence[Sequence[int]], max_new: int
) -> tuple[Tensor, Tensor, int, Tensor]:
    """Decode prompts greedily, without speculation.

    Args:
        texts: the prompts as token ids.
        max_new: the number of new tokens for each prompt.

    Returns:
        The ids `[B, L + max_new]`, their mask `[B, L + max_new - 1]` without the last token, the padded
        prompt length L, and the gap between the top two logits at each new token `[B, max_new]`.
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
    """Find the tokens where cached decoding differs from the argmax of one forward without a cache.

    Both read the same padded batch, because faults of padding belong to the check `padding`.

    Args:
        texts: some of the prompts, as token ids.
        first: the number of the first of them.

    Returns:
        Records of `prompt` (counted from `first`), `position` (tokens generated before it) and `margin`: the
        best logit of the forward without a cache minus the chosen token's logit.
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
    """Find the first token of each prompt where speculative decoding differs from plain decoding.

    Later tokens follow a different text, so they are not compared.

    Args:
        texts: some of the prompts, as token ids.
        first: the number of the first of them.

    Returns:
        Records of `prompt` (counted from `first`), `position` (tokens generated before it) and `margin`: the
        gap between the top two logits of plain decoding.
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
    """Return the new tokens of each text, decoded with speculation."""
    parts = [texts] if speculation.batched else [[text] for text in texts]
    return [row for part in parts for row in written(speculation.run(part, max_new))]


def mismatch(prompt: int, position: int, margin: Tensor) -> dict[str, Any]:
    """Return the JSON record of a token that differs from the expected one.

    Args:
        prompt: the number of the prompt.
        position: the number of tokens generated before it.
        margin: the gap between two logits (each caller says which). NaN and infinity become 1e30, because
            JSON has neither.
    """
    return {
        "prompt": prompt,
        "position": position,
        "margin": margin.nan_to_num(nan=torch.inf).clamp_max(1e30).item(),
    }
