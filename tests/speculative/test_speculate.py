"""The loop of speculative decoding against plain greedy decoding of each row alone, whatever is drafted."""

import random

import pytest
import torch
from drafters import Oracle
from families import AUGMENTED, swapped
from token_trees import GROUPS, random_ids, random_tree

from linearize_cli.errors import UserError
from linearize_cli.models.decoding import forward
from linearize_cli.runtime.tree import ancestors
from linearize_cli.speculative.accept import Greedy, Sampling, Typical, longest
from linearize_cli.speculative.decode import speculate
from linearize_cli.speculative.drafts import Draft, Lookup, NoDraft

VOCABULARY = 99
CHAIN, DEEP = list(range(-1, 5)), list(range(-1, 21))  # DEEP: beyond every window and group here
FORK = [-1, 0, 0, 1, 1, 2, 3, 6, 7]
TREES = {"root": [[-1]], "chain": [CHAIN], "deep": [DEEP], "trees": [[-1], CHAIN, FORK, [-1, 0, 0, 0, 0]]}
LENGTHS = [1, 2, 7, 8, 20]  # shorter than the conv, around a window, beyond two


@torch.no_grad()
def greedy(model, prompt, max_new, stop=()):
    """The prompt and what follows it, without any cache."""
    row = list(prompt)
    while len(row) < len(prompt) + max_new and not (len(row) > len(prompt) and row[-1] in stop):
        row.append(int(forward(model, torch.tensor([row]))[0, -1].argmax()))
    return row


def run(model, prompts, drafter, max_new, **options):
    """Rows with their prompts, and the steps."""
    steps = list(speculate(model, prompts, drafter, max_new, **options))
    rows = [[*prompt, *(t for step in steps for t in step.tokens[i])] for i, prompt in enumerate(prompts)]
    return rows, steps


def prompts_of(*lengths):
    return [random_ids(n, seed=n).tolist() for n in lengths]


@pytest.fixture(scope="module")
def model():
    return swapped("llama", keep=1, num_hidden_layers=2)


@pytest.fixture(scope="module")
def known(model):
    return [greedy(model, prompt, 40) for prompt in prompts_of(*LENGTHS)]


@pytest.mark.parametrize("trees", TREES)
@pytest.mark.parametrize("right", [0.0, 0.7, 1.0])
def test_what_is_drafted_does_not_matter(model, known, right, trees):
    """Never, sometimes and always right; with trees that are a root alone, and deeper than window and group."""
    drafter = Oracle(known, right, TREES[trees], VOCABULARY)
    rows, steps = run(model, prompts_of(*LENGTHS), drafter, 30)
    assert rows == [row[: n + 30] for row, n in zip(known, LENGTHS, strict=True)]
    accepted = [n for step in steps[1:] for n in step.accepted if n is not None]
    assert steps[0].accepted == [None] * 5 and all(len(t) == 1 for t in steps[0].tokens)
    if right == 0 or trees == "root":
        assert len(steps) == 30 and not any(accepted)
    if right == 1 and trees in ("chain", "deep"):
        depth = len(TREES[trees][0]) - 1
        assert len(steps) == 1 + -(-29 // (depth + 1)) and accepted[0] == depth
    for step in steps[1:]:
        for tokens, count in zip(step.tokens, step.accepted, strict=True):
            assert len(tokens) <= (count or 0) + 1


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("attention", [AUGMENTED, GROUPS], ids=["sliding", "groups"])
@pytest.mark.parametrize("family", ["gpt2", "mistral"])
def test_families_and_forms(family, attention, keep):
    model, rng = swapped(family, attention, keep=keep, num_hidden_layers=2), random.Random(3)
    known = [greedy(model, prompt, 30) for prompt in prompts_of(1, 9, 20)]
    trees = [random_tree(rng, 10) for _ in range(4)]
    for drafter in (Oracle(known, 0.6, trees, VOCABULARY), Lookup(), NoDraft()):
        rows, _ = run(model, prompts_of(1, 9, 20), drafter, 30)
        assert rows == known


def test_a_row_of_a_batch_is_as_alone(model, known):
    for prompt, row in zip(prompts_of(*LENGTHS), known, strict=True):
        assert run(model, [prompt], Oracle([row], 0.7, TREES["trees"], VOCABULARY), 40)[0] == [row]


@pytest.mark.parametrize("right", [0.7, 1.0])
def test_an_end_inside_a_tree_ends_its_row_alone(model, known, right):
    """Whichever token ends a row: nothing follows it, and the others go on to their own ends."""
    for stop in {row[n + 4] for row, n in zip(known, LENGTHS, strict=True)} | {known[0][1]}:
        expected = [greedy(model, prompt, 30, [stop]) for prompt in prompts_of(*LENGTHS)]
        drafter = Oracle(known, right, [CHAIN, FORK], VOCABULARY)
        rows, steps = run(model, prompts_of(*LENGTHS), drafter, 30, stop=[stop])
        assert rows == expected
        assert any(len(row) < n + 30 for row, n in zip(rows, LENGTHS, strict=True))
        for i in range(len(rows)):  # once it has ended, a row has no tokens and counts no acceptance
            last = max(s for s, step in enumerate(steps) if step.tokens[i])
            assert all(step.tokens[i] == [] and step.accepted[i] is None for step in steps[last + 1 :])


def test_the_limit_inside_a_tree(model, known):
    for max_new in range(1, 9):
        rows, steps = run(model, prompts_of(*LENGTHS), Oracle(known, 1.0, [CHAIN], VOCABULARY), max_new)
        assert rows == [row[: n + max_new] for row, n in zip(known, LENGTHS, strict=True)]
        # No node is verified whose token could not be given out any more.
        assert all(step.nodes <= max_new for step in steps)


def test_the_last_position_is_not_passed():
    """GPT-2 has learned positions: one more would be an error."""
    model = swapped("gpt2", keep=1, num_hidden_layers=2, n_layer=2, n_positions=24)
    prompts = prompts_of(3, 12)
    known = [greedy(model, prompt, 12) for prompt in prompts]
    rows, steps = run(model, prompts, Oracle(known, 1.0, [DEEP], VOCABULARY), 12, context=24)
    assert rows == known and len(rows[1]) == 24
    assert max(step.nodes for step in steps) > 5
    for drafter in (NoDraft(), Oracle(known, 1.0, [DEEP], VOCABULARY)):  # rows that would pass it end there
        rows, _ = run(model, prompts, drafter, 200, context=24)
        assert list(map(len, rows)) == [24, 24] and rows[1] == known[1] and rows[0][:15] == known[0]
    with pytest.raises(UserError, match="a prompt of 24 tokens fills the model's 24 positions"):
        run(model, prompts_of(3, 24), NoDraft(), 1, context=24)


def test_rows_end_at_different_times(model, known):
    """A chain of always right tokens for one row, wrong ones for the others."""

    class Uneven(Oracle):
        def nodes(self, row, known, parents):
            self.right = 1.0 if known is self.known[2] else 0.0
            return super().nodes(row, known, parents)

    rows, steps = run(model, prompts_of(*LENGTHS), Uneven(known, 0.0, [CHAIN], VOCABULARY), 30)
    assert rows == [row[: n + 30] for row, n in zip(known, LENGTHS, strict=True)]
    assert len(steps) == 30 and sum(bool(step.tokens[2]) for step in steps) == 6


def test_sampling_by_a_generator_can_be_repeated(model):
    def sampled(seed, drafter):
        rule = Sampling(1.0, torch.Generator().manual_seed(seed))
        return run(model, prompts_of(1, 9), drafter, 20, rule=rule)[0]

    assert sampled(0, Lookup()) == sampled(0, Lookup()) != sampled(1, Lookup())
    torch.manual_seed(5)
    first = sampled(0, NoDraft())
    torch.manual_seed(6)
    assert sampled(0, NoDraft()) == first


def test_rules_say_whether_they_are_lossless():
    assert Greedy().lossless and Sampling().lossless and not Typical().lossless
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(1, 4, 4)
    ids, parents = torch.tensor([[0, 1, 2, 3]]), torch.tensor([-1, 0, 0, 0])
    # min(0.09, 0.3 exp(-H)) = 0.09 here: all but the last are probable enough, though the target would rarely say 2.
    accepted, _ = Typical(generator=torch.Generator())(logits, ids, parents)
    assert accepted.tolist() == [[True, True, True, False]]
    accepted, tokens = Greedy()(logits, ids, parents)
    assert accepted.tolist() == [[True, False, False, False]] and tokens.tolist() == [[0] * 4]


def test_a_path_ends_before_its_first_node_that_is_not_accepted():
    visible, _ = ancestors(tuple(FORK))
    cases = {
        (): 0,
        (1,): 1,
        (3,): 0,
        (1, 3): 3,
        (1, 4, 2, 5): 4,
        (2, 5): 5,
        (1, 3, 6, 7, 8): 8,
        (1, 6, 7, 8): 1,
    }
    for nodes, deepest in cases.items():
        accepted = torch.zeros(1, len(FORK), dtype=torch.bool)
        accepted[0, [0, *nodes]] = True
        assert longest(accepted, visible).tolist() == [deepest]


def test_drafts_are_cut_to_what_is_wanted():
    draft = Draft(torch.arange(9)[None], FORK)
    assert draft.at_most(9) is draft
    cut = draft.at_most(2)
    assert cut.ids.tolist() == [[0, 1, 2, 3, 4, 5]] and list(cut.parents) == [-1, 0, 0, 1, 1, 2]
    for depth in (0, -3):
        assert draft.at_most(depth).ids.tolist() == [[0]]
    shuffled = Draft(torch.arange(4)[None], [-1, 0, 1, 0]).at_most(1)
    assert shuffled.ids.tolist() == [[0, 1, 3]] and list(shuffled.parents) == [-1, 0, 0]


def test_lookup_finds_the_latest_longest_match():
    lookup = Lookup(length=3, ngram=2)
    assert lookup.continuation([1, 2, 3, 1, 2, 4, 5, 1, 2]) == [4, 5, 1]
    assert lookup.continuation([7, 2, 3, 1, 2]) == [3, 1, 2]  # by one token, for no two occur before
    assert lookup.continuation([1, 2, 3]) == [] == lookup.continuation([1])
    draft = lookup.draft([[1, 2, 1], [4]], torch.zeros(2, 1))
    assert draft.ids.tolist() == [[1, 2, 1], [4, 4, 4]] and list(draft.parents) == [-1, 0, 1]


def test_a_state_that_cannot_branch_is_a_user_error():
    with pytest.raises(UserError, match="cannot verify a token tree: .*cannot branch off"):
        list(speculate(swapped("lfm2"), [[5, 6, 7]], NoDraft(), 4))
