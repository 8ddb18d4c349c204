"""The check `drafts`: speculative decoding with drafts in which the number of right tokens is known.

The drafts have none, some or all tokens right. One ends in a stop token, one runs into the end of the
context.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from linearize_cli.speculative.decode import speculate, written
from linearize_cli.speculative.drafts import Draft
from linearize_cli.verification.check import FAIL, OK, TIE, Finding, Line, Subject, not_checked
from linearize_cli.verification.greedy import TIES, decoded, mismatch

DEPTH, ROWS, NEW = 4, 4, 32  # tokens of a drafted chain, number of prompts, new tokens for each prompt


@dataclass
class Oracle:
    """A drafter for tests. It knows the model's own next tokens, and drafts some of them followed by a wrong
    one.

    Attributes:
        texts: each row's prompt and greedy continuation, as token ids.
        right: how many drafted tokens are right. Each step uses the next number, in a cycle.
        vocabulary: the size of the model's vocabulary.
        asked: the number of right tokens of each step so far.
    """

    texts: list[list[int]]
    right: Sequence[int]
    vocabulary: int
    asked: list[int] = field(default_factory=list)

    def draft(self, rows: Sequence[Sequence[int]], hidden: Tensor) -> Draft:
        """Draft a chain of `DEPTH` tokens for each row, with a wrong token after the right ones.

        Args:
            rows: the token ids of each row so far.
            hidden: last hidden states, of which only the device is used.
        """
        right = self.right[len(self.asked) % len(self.right)]
        self.asked.append(right)
        ids = []
        for row, text in zip(rows, self.texts, strict=True):
            chain = [*text[len(row) : len(row) + DEPTH], *[0] * DEPTH][:DEPTH]
            if right < DEPTH:
                chain[right] = (chain[right] + 1) % self.vocabulary
            ids.append([row[-1], *chain])
        return Draft(torch.tensor(ids, device=hidden.device), range(-1, DEPTH))


def drafts(subject: Subject) -> Finding:
    """Compare the texts of speculative and plain greedy decoding, for drafts with 0 to 4 right tokens.

    Two more runs end within a draft: one at a stop token, one at the end of the context.
    """
    if subject.no_tree:
        return not_checked("drafts", subject.no_tree)
    prompts = subject.texts[:ROWS]
    new = min(NEW, subject.context - max(map(len, prompts)))
    plain, _, length, margins = decoded(subject.task, subject.model, prompts, new)
    continued = [row[length:].tolist() for row in plain]
    texts = [[*prompt, *more] for prompt, more in zip(prompts, continued, strict=True)]
    vocabulary = subject.model.get_input_embeddings().num_embeddings
    oracle = Oracle(texts, range(DEPTH + 1), vocabulary)
    steps = list(speculate(subject.model, prompts, oracle, new))
    found = differing(written(steps), continued, margins)
    wrong_depths = 0 if found else count_wrong_depths(steps[1:], oracle, new)
    stop = continued[0][new // 2]
    ends = [row[: row.index(stop) + 1] if stop in row else row for row in continued]
    ended = speculate(subject.model, prompts, Oracle(texts, [DEPTH], vocabulary), new, stop=[stop])
    found += differing(written(ended), ends, margins)
    context = max(map(len, prompts)) + DEPTH + 3  # it ends within a draft
    cut = [row[: context - len(prompt)] for row, prompt in zip(continued, prompts, strict=True)]
    full = speculate(subject.model, prompts, Oracle(texts, [DEPTH], vocabulary), new, context=context)
    found += differing(written(full), cut, margins)
    limit = TIES * subject.noise
    tied = all(x["margin"] < limit for x in found)
    verdict = FAIL if wrong_depths or not tied else TIE if found else OK
    said = f"{len(found)} of {3 * len(prompts)} texts differ, {wrong_depths} drafts accepted to a wrong depth"
    data = {"texts": 3 * len(prompts), "mismatches": len(found), "wrong_depths": wrong_depths}
    return Finding(
        {"drafts": data}, [Line("drafts", said, f"margin {limit:.1e}", verdict)], {"drafts": limit}
    )


def differing(rows: list[list[int]], expected: list[list[int]], margins: Tensor) -> list[dict]:
    """Return the first difference of each row from the expected tokens, as `mismatch` records. Equal rows
    give none.

    Args:
        rows: the tokens that were generated.
        expected: the tokens of plain decoding.
        margins: `[B, new]`, the gap between the top two logits at each new token of plain decoding.
    """
    found = []
    for row, (actual, due) in enumerate(zip(rows, expected, strict=True)):
        if actual != due:
            same = [a == b for a, b in zip(actual, due, strict=False)]
            place = same.index(False) if False in same else len(same)
            # A row with the wrong length cannot be excused as a tie.
            margin = margins[row, place] if False in same else margins.new_tensor(torch.inf)
            found.append(mismatch(row, place, margin))
    return found


def count_wrong_depths(steps: Sequence, oracle: Oracle, new: int) -> int:
    """Count the cases (a step and a row) in which the model accepted another number of drafted tokens than
    are right.

    Rows with too few tokens left for the whole draft are not counted.

    Args:
        steps: the results of the model's forwards.
        oracle: the drafter, which knows the numbers of right tokens.
        new: the number of new tokens for each prompt.
    """
    wrong, tokens = 0, [1] * len(oracle.texts)
    for step, right in zip(steps, oracle.asked, strict=True):
        for row, accepted in enumerate(step.accepted):
            if accepted is not None and new - tokens[row] > DEPTH:
                wrong += accepted != right
            tokens[row] += len(step.tokens[row])
    return wrong
