"""Tokens sampled speculatively are distributed as the target's own."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearize_cli.decoder import forward, marked, pad_left
from linearize_cli.measure.distribution import integral_transform, uniformity
from linearize_cli.speculative.accept import Rule, Sampling
from linearize_cli.speculative.decode import speculate, written
from linearize_cli.speculative.drafts import Drafter
from linearize_cli.verify_checks.check import FAIL, OK, Finding, Line, Subject, not_checked

TOKENS, NEW = 1024, 32  # in all at least, and of a row at most
PREFIX = 128  # tokens of a prompt, at most: there may be a prompt for each token that is sampled
LOGITS = 1 << 26  # of the trees of rows that are decoded together
IMPROBABLE = 1e-4  # a sound model fails once in 10,000 seeds


def sampling(subject: Subject) -> Finding:
    """Rejection sampling; typical acceptance is lossy by intent."""
    if subject.no_tree:
        return not_checked("sampling", subject.no_tree)
    new = min(subject.max_new, NEW)
    rows = [subject.texts[i % len(subject.texts)][:PREFIX] for i in range(-(-TOKENS // new))]
    vocabulary = subject.model.get_input_embeddings().num_embeddings
    batch = max(1, LOGITS // (vocabulary * len(subject.parents)))
    generator = subject.generator()
    rule = Sampling(generator=generator)
    places = [
        sampled_places(subject.model, rows[first : first + batch], subject.drafter, rule, new, generator)
        for first in range(0, len(rows), batch)
    ]
    found = uniformity(torch.cat(places))
    said = f"chi-square {found['chi_square']:.1f} of {found['tokens']:,} tokens: p {found['p_value']:.2g}"
    verdict = OK if found["p_value"] >= IMPROBABLE else FAIL
    return Finding(
        {"sampling": found},
        [Line("sampling", said, f"p {IMPROBABLE:.0e}", verdict)],
        {"sampling": IMPROBABLE},
    )


def sampled_places(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    drafter: Drafter,
    rule: Rule,
    new: int,
    generator: torch.Generator,
) -> Tensor:
    """Where the tokens that are sampled behind these rows lie in the distributions of a forward without a cache."""
    drawn = written(speculate(model, rows, drafter, new, rule))
    whole = [
        torch.tensor([*row, *tokens], device=model.device) for row, tokens in zip(rows, drawn, strict=True)
    ]
    ids, mask = pad_left(whole)
    logits = marked(forward(model, ids, None, mask), mask)
    logits = torch.cat([own[-len(tokens) - 1 : -1] for own, tokens in zip(logits, drawn, strict=True)])
    tokens = torch.tensor([token for tokens in drawn for token in tokens])
    return integral_transform(logits, tokens, rule.temperature, generator)
