"""Tokens that are sampled speculatively have the target's distribution: a chi-square over 20 seeds, at 1%."""

import random

import pytest
import torch
from families import swapped
from token_trees import random_ids, random_tree

from linearize_cli.metrics.distribution import integral_transform, uniformity
from linearize_cli.models.decoding import forward
from linearize_cli.speculative.accept import Sampling, Typical
from linearize_cli.speculative.assisted import assisted
from linearize_cli.speculative.decode import speculate
from linearize_cli.speculative.drafts import Draft
from linearize_cli.speculative.pairs import Pair

SEEDS, ROWS, NEW, VOCABULARY = 20, 16, 12, 12
CHAIN = [-1, 0, 1, 2]


class Guess:
    """Random tokens on trees that are drawn anew for each step, siblings alike now and then."""

    def __init__(self, seed, trees):
        self.rng, self.trees = random.Random(seed), trees

    def draft(self, rows, hidden):
        parents = self.rng.choice(self.trees)
        ids = [[row[-1], *self.rng.choices(range(VOCABULARY), k=len(parents) - 1)] for row in rows]
        return Draft(torch.tensor(ids), parents)


class Eager(Sampling):
    """A deliberate bias: a third of what should be rejected is accepted."""

    def __call__(self, logits, ids, parents):
        accepted, tokens = super().__call__(logits, ids, parents)
        return accepted | (torch.rand(accepted.shape, generator=self.generator) < 1 / 3), tokens


@pytest.fixture(scope="module")
def model():
    """So few tokens that guesses come true, some of them much more probable than others."""
    model = swapped("llama", keep=1, num_hidden_layers=2, vocab_size=VOCABULARY)
    model.lm_head.weight.data *= 2
    return model


def trees():
    rng = random.Random(1)
    return [random_tree(rng, 12) for _ in range(8)]


@torch.no_grad()
def places(model, prompts, written, temperature, generator):
    """Return the quantiles of the tokens after prompts `[B, T]` in the distributions of forwards without a cache."""
    logits = forward(model, torch.cat([prompts, written], 1))[:, prompts.shape[1] - 1 : -1]
    return integral_transform(logits.flatten(0, 1), written.flatten(), temperature, generator)


def pooled(model, rule, drafted, temperature):
    """The p-value of all seeds' tokens together, and the mean of the tokens that a step gives a row."""
    found, steps = [], 0
    for seed in range(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        drafter = Guess(seed, drafted)
        prompts = random_ids(ROWS, 5, seed=seed) % VOCABULARY
        taken = list(speculate(model, prompts.tolist(), drafter, NEW, rule(temperature, generator)))
        steps += sum(len(step.tokens[0]) > 0 for step in taken)
        written = torch.tensor([[t for step in taken for t in step.tokens[row]] for row in range(ROWS)])
        found.append(places(model, prompts, written, temperature, generator))
    found = torch.cat(found)
    assert len(found) == SEEDS * ROWS * NEW
    return uniformity(found)["p_value"], SEEDS * NEW / steps


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("drafted", [[CHAIN], trees()], ids=["chains", "trees"])
def test_the_distribution_is_the_target_s(model, drafted, temperature):
    p_value, mean = pooled(model, Sampling, drafted, temperature)
    assert p_value > 0.01 and mean > 1.05  # tokens were accepted, so there was something to go wrong


@pytest.mark.parametrize("rule", [Eager, Typical])
def test_another_distribution_is_found_out(model, rule):
    assert pooled(model, rule, trees(), 1.0)[0] < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_assisted_generation_samples_from_its_target(model, temperature):
    """A linearized model and a softmax one draft for each other through transformers."""
    other = swapped("mistral", keep=1, num_hidden_layers=2, vocab_size=VOCABULARY)
    for pair in (Pair(model, other, None), Pair(other, model, None)):
        found, accepted = [], 0
        for seed in range(SEEDS):
            torch.manual_seed(seed)
            prompt = random_ids(1, 5, seed=seed) % VOCABULARY
            steps = assisted(pair, prompt[0].tolist(), 60, drafted=3, temperature=temperature)
            accepted += sum(step.accepted[0] for step in steps)
            written = torch.tensor([[token for step in steps for token in step.tokens[0]]])
            found.append(
                places(pair.target, prompt, written, temperature, torch.Generator().manual_seed(seed))
            )
        assert uniformity(torch.cat(found))["p_value"] > 0.01 and accepted > 100


def test_the_measure_itself():
    """Uniform of what was drawn from the distribution; p-values as tables have them."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 7, generator=generator) * 2
    for temperature in (1.0, 0.5):
        p = (logits / temperature).softmax(-1)
        tokens = torch.multinomial(p, 1, generator=generator).squeeze(1)
        assert uniformity(integral_transform(logits, tokens, temperature, generator))["p_value"] > 0.01
        assert uniformity(integral_transform(logits, tokens, 0.8, generator))["p_value"] < 1e-6
    even = torch.arange(20).repeat(50) / 20 + 0.01
    assert uniformity(even)["p_value"] == pytest.approx(1)
    # Of 19 degrees of freedom; the p-value of 30.144 is 0.05.
    skewed = torch.cat([even, torch.full((50,), 0.01)])
    counts = torch.tensor([100.0, *[50.0] * 19])
    chi_square = ((counts - 52.5).square() / 52.5).sum().item()
    assert uniformity(skewed)["chi_square"] == pytest.approx(chi_square) and 30.144 < chi_square < 50
    assert 1e-4 < uniformity(skewed)["p_value"] < 0.05
