"""The check `sampling`: tokens sampled with speculation follow the model's own distribution.

The test is the probability integral transform (PIT) of the tokens, and a chi-square test that it is uniform.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from linearize_kernels.reference.visibility import ancestors
from torch import Tensor
from transformers import PreTrainedModel

from linearize_cli.metrics.distribution import integral_transform, uniformity
from linearize_cli.models.decoding import forward, marked, pad_left
from linearize_cli.speculative.accept import Rule, Sampling, longest
from linearize_cli.speculative.decode import speculate, written
from linearize_cli.speculative.drafts import Draft, Drafter
from linearize_cli.verification.check import FAIL, OK, Finding, Line, Subject, not_checked

TOKENS, NEW = 1024, 32  # at least this many sampled tokens in all, at most this many for each row
PREFIX = 128  # the longest prompt in tokens. There can be as many prompts as sampled tokens.
SHORT = 16  # the longest prompt and the most new tokens for a drafter that reads the whole row at every step
LOGITS = 1 << 26  # the most logits of the token trees of rows that are decoded together
IMPROBABLE = 1e-4  # the p-value below which the check fails: once in 10,000 seeds for a sound model
# For the acceptance rule alone: the number of known distributions, samples of each, and their vocabulary. The best
# token has 2% to 98% of the probability. A rule that is off by 2% fails for more than 99 of 100 seeds.
DISTRIBUTIONS, SAMPLES, VOCABULARY = 49, 1024, 24


class Setting(NamedTuple):
    """The settings of sampling: the temperature, and the total probability of the tokens to sample from
    (`top_p`).
    """

    temperature: float = 1.0
    top_p: float = 1.0


SETTINGS = (Setting(), Setting(0.7), Setting(1.3), Setting(1.0, 0.9))


@dataclass(frozen=True)
class BestToken:
    """A drafter of one token: the model's own most probable next token, from a forward without a cache."""

    model: PreTrainedModel

    def draft(self, rows: Sequence[Sequence[int]], hidden: Tensor) -> Draft:
        """Return a tree of the row's last token and one child.

        Args:
            rows: the token ids of each row so far.
            hidden: last hidden states, of which only the device is used.
        """
        ids, mask = pad_left([torch.tensor(row, device=hidden.device) for row in rows])
        best = forward(self.model, ids, None, mask, last=True)[:, -1].argmax(-1, keepdim=True)
        return Draft(torch.cat([ids[:, -1:], best], 1), [-1, 0])


def sampling(subject: Subject) -> Finding:
    """Test that tokens sampled by speculative decoding follow the model's distribution, at several settings.

    The acceptance rule is tested alone, and with whole texts. Typical acceptance is not tested, because it
    changes the distribution by design.
    """
    if subject.no_tree:
        return not_checked("sampling", subject.no_tree)
    generator = subject.generator()
    found = {"rule": worst([rule_pit(setting, generator) for setting in SETTINGS])}
    texts = [text_pit(subject, subject.drafter, Setting(), generator, PREFIX, NEW)]
    if not subject.quick:
        drafter = BestToken(subject.model)
        texts += [text_pit(subject, drafter, x, generator, SHORT, SHORT) for x in SETTINGS]
    found["texts"] = worst(texts)
    lines = []
    for name, part in found.items():
        limit = IMPROBABLE / part["settings"]
        said = f"{name}: chi-square {part['chi_square']:.1f} of {part['tokens']:,} tokens: p {part['p_value']:.2g}"
        verdict = OK if part["p_value"] >= limit else FAIL
        lines.append(Line("sampling", said, f"p {limit:.1e}", verdict))
    data = {**found["texts"], "rule": found["rule"]}
    limit = IMPROBABLE / max(part["settings"] for part in found.values())
    return Finding({"sampling": data}, lines, {"sampling": limit})


def worst(values: list[Tensor]) -> dict[str, Any]:
    """Test each tensor of values for uniformity, and return the result with the smallest p-value.

    Args:
        values: for each test, values in [0, 1) that should be uniform.

    Returns:
        The result of `uniformity`, with the number of tests as `settings`.
    """
    tests = [uniformity(x) for x in values]
    return {**min(tests, key=lambda test: test["p_value"]), "settings": len(tests)}


def rule_pit(setting: Setting, generator: torch.Generator) -> Tensor:
    """Sample tokens from known distributions with the acceptance rule alone. The most probable token is
    always drafted.

    Args:
        setting: the temperature and `top_p`.

    Returns:
        The probability integral transform of each token, `[M]` in [0, 1) (see `integral_transform`).
    """
    best = torch.linspace(0.02, 0.98, DISTRIBUTIONS, dtype=torch.float64)[:, None]
    others = torch.rand(DISTRIBUTIONS, VOCABULARY - 1, generator=generator, dtype=torch.float64) + 0.1
    others = others / others.sum(-1, keepdim=True) * (1 - best)
    logits = torch.cat([best, others], -1).log().repeat(SAMPLES, 1)
    rule = Sampling(setting.temperature, generator, setting.top_p)
    parents = torch.tensor([-1, 0])
    ids = torch.tensor([[1, 0]]).expand(len(logits), -1)
    accepted, following = rule(logits[:, None].expand(-1, 2, -1), ids, parents)
    last = longest(accepted, ancestors((-1, 0))[0])
    tokens = torch.where(last == 1, ids[:, 1], following[:, 0])
    return integral_transform(logits, tokens, setting.temperature, generator, setting.top_p)


def text_pit(
    subject: Subject,
    drafter: Drafter,
    setting: Setting,
    generator: torch.Generator,
    prefix: int,
    new: int,
) -> Tensor:
    """Sample continuations of the prompts by speculative decoding, at least `TOKENS` tokens in all.

    Args:
        drafter: drafts the tokens.
        setting: the temperature and `top_p`.
        prefix: the longest prompt in tokens. Longer ones are cut.
        new: the largest number of new tokens for each prompt.

    Returns:
        The probability integral transform of each new token, `[M]` in [0, 1) (see `integral_transform`).
    """
    new = min(subject.max_new, new)
    rows = [subject.texts[i % len(subject.texts)][:prefix] for i in range(-(-TOKENS // new))]
    vocabulary = subject.model.get_input_embeddings().num_embeddings
    batch = max(1, LOGITS // (vocabulary * len(subject.parents)))
    rule = Sampling(setting.temperature, generator, setting.top_p)
    values = [
        sampled_pit(subject.model, rows[first : first + batch], drafter, rule, new, generator)
        for first in range(0, len(rows), batch)
    ]
    return torch.cat(values)


def sampled_pit(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    drafter: Drafter,
    rule: Rule,
    new: int,
    generator: torch.Generator,
) -> Tensor:
    """Sample `new` tokens after each prompt by speculative decoding.

    Args:
        rows: the prompts as token ids.
        drafter: drafts the tokens.
        rule: accepts or rejects drafted tokens.

    Returns:
        The probability integral transform of each new token, `[M]` in [0, 1) (see `integral_transform`). The
        distributions are those of a forward without a cache.
    """
    sampled = written(speculate(model, rows, drafter, new, rule))
    whole = [
        torch.tensor([*row, *tokens], device=model.device) for row, tokens in zip(rows, sampled, strict=True)
    ]
    ids, mask = pad_left(whole)
    logits = marked(forward(model, ids, None, mask), mask)
    logits = torch.cat([own[-len(tokens) - 1 : -1] for own, tokens in zip(logits, sampled, strict=True)])
    tokens = torch.tensor([token for tokens in sampled for token in tokens])
    return integral_transform(logits, tokens, rule.temperature, generator, rule.top_p)
