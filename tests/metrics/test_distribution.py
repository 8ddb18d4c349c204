"""Sampled tokens against the distribution that they should have."""

import pytest
import torch
from families import SMALL, swapped

from linearize_cli.metrics.distribution import integral_transform, uniformity
from linearize_cli.models.decoding import forward
from linearize_cli.speculative.accept import Sampling, Typical, follows
from linearize_cli.speculative.drafts import Draft
from linearize_cli.verification.sampling import sampled_pit


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_places_lie_within_the_token_s_own_mass():
    logits = torch.tensor([[0.1, 0.6, 0.3]]).log().expand(3, 3)
    places = integral_transform(logits, torch.tensor([1, 2, 0]), 1.0, generator())
    for place, low, high in zip(places.tolist(), (0.0, 0.6, 0.9), (0.6, 0.9, 1.0), strict=True):
        assert low <= place < high
    halves = integral_transform(logits.repeat(400, 1), torch.tensor([1]).repeat(1200), 1.0, generator())
    assert halves.max() > 0.59 and abs(halves.mean() - 0.3) < 0.02


def test_chi_square_by_hand():
    """Two bins, 30 and 70 of 100: chi-square 16 of one degree of freedom, whose tail is 6.334e-05."""
    places = torch.cat([torch.full((30,), 0.2), torch.full((70,), 0.9)])
    found = uniformity(places, 2)
    assert found["chi_square"] == pytest.approx(16) and found["p_value"] == pytest.approx(6.334e-05, rel=1e-3)
    assert uniformity(torch.rand(4000, generator=generator()))["p_value"] > 0.01


def test_draws_from_other_distributions_are_rejected():
    logits = torch.randn(4000, 50, generator=generator())
    for temperature, sound in ((1.0, True), (0.8, False), (1.2, False)):
        p = (logits / temperature).softmax(-1)
        tokens = torch.multinomial(p, 1, generator=generator(1)).squeeze(-1)
        p_value = uniformity(integral_transform(logits, tokens, 1.0, generator(2)))["p_value"]
        assert p_value > 0.01 if sound else p_value < 1e-6


class Probable:
    """Drafts the model's own likeliest tokens."""

    def __init__(self, model, width: int = 3):
        self.model, self.width = model, width

    def draft(self, rows, hidden) -> Draft:
        logits = torch.stack([forward(self.model, torch.tensor([row]))[0, -1] for row in rows])
        ids = torch.cat([torch.tensor([row[-1:] for row in rows]), logits.topk(self.width).indices], 1)
        return Draft(ids, [-1, *[0] * self.width])


class Twice(Sampling):
    """A child that is rejected may still be drawn in its own place: it has two chances."""

    def __call__(self, logits, ids, parents):
        return follows(self.draw(logits), ids, parents), self.draw(logits)


@pytest.mark.parametrize("rule, sound", [(Sampling, True), (Twice, False), (Typical, False)])
@torch.inference_mode()
def test_rules_of_acceptance(rule, sound):
    """Over 20 seeds: rejection sampling is not rejected at 1%; what is biased or lossy is."""
    model = swapped("llama", num_hidden_layers=1)
    model.lm_head.weight *= 2
    rows = torch.randint(3, SMALL["vocab_size"], (10, 5), generator=generator()).tolist()
    places = [
        sampled_pit(model, rows, Probable(model), rule(0.9, generator(seed)), 6, generator(seed + 100))
        for seed in range(20)
    ]
    found = uniformity(torch.cat(places))
    assert found["tokens"] == 1200
    assert found["p_value"] > 0.01 if sound else found["p_value"] < 1e-4
