"""Trees of choices: their form, their names and files, and the one that is worth its cost."""

import json
from itertools import product

import pytest

from linearize_cli.errors import UserError
from linearize_cli.speculative.trees import (
    NAMED,
    Choices,
    chain,
    interpolated,
    likeliest,
    named_tree,
    optimised,
)

RATES = [[0.5, 0.2, 0.1], [0.4, 0.15, 0.15], [0.3, 0.0, 0.0]]


def test_the_published_tree_has_its_published_counts():
    tree = NAMED["mc_sim_7b_63"]
    parents = tree.parents
    assert len(parents) == 64 and tree.depth == 4 and tree.width == 10
    assert len(set(range(64)) - set(parents)) == 42, "leaves"
    by_depth = [sum(len(path) == depth for path in tree.paths) for depth in range(1, 5)]
    assert by_depth == [10, 28, 23, 2]


def test_parents_come_before_their_children():
    tree = Choices.of([[1, 0], [0], [0, 2], [1], [0, 2, 5]])
    assert tree.paths == ((0,), (1,), (0, 2), (1, 0), (0, 2, 5))
    assert tree.parents == [-1, 0, 0, 1, 2, 3]
    assert (tree.depth, tree.width) == (3, 6)
    assert chain(3).parents == [-1, 0, 1, 2] and chain(3).width == 1
    assert Choices.of([]).parents == [-1] and Choices.of([]).depth == Choices.of([]).width == 0


@pytest.mark.parametrize("paths", [[[0, 0]], [[0], [0]], [[]], [[0], [1, 0, 0], [1]]])
def test_what_is_no_tree_is_refused(paths):
    with pytest.raises(ValueError, match="no parent|twice|root"):
        Choices.of(paths)


def longest_match(paths, right):
    return max((len(p) for p in paths if p == tuple(right[: len(p)])), default=0)


def test_expected_tokens_by_enumeration():
    """At every depth one rank is right, or none: all outcomes with their probabilities."""
    tree = Choices.of([[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0]])
    depths = [[*enumerate(rates), (None, 1 - sum(rates))] for rates in RATES]
    total = 0.0
    for outcome in product(*depths):
        probability = 1.0
        for _, rate in outcome:
            probability *= rate
        total += probability * (1 + longest_match(tree.paths, [rank for rank, _ in outcome]))
    assert tree.expected(RATES) == pytest.approx(total)


def test_the_likeliest_nodes_of_all():
    every = [path for depth in (1, 2, 3) for path in product(range(3), repeat=depth)]
    products = {path: 1.0 for path in every}
    for path in every:
        for rates, rank in zip(RATES, path, strict=False):
            products[path] *= rates[rank]
    best = sorted(products.values(), reverse=True)
    for nodes in (1, 2, 5, 12, 40):
        found = likeliest(RATES, nodes)
        assert Choices.of(found).parents, "any first ones are a tree"
        assert sorted((products[p] for p in found), reverse=True) == pytest.approx(best[: nodes - 1])


def test_the_best_tree_follows_from_the_cost():
    free = optimised(RATES, {1: 1.0, 8: 1.0, 16: 1.0})
    assert len(free.parents) >= 13 and free.expected(RATES) > 1.9
    assert optimised(RATES, {1: 1.0, 2: 2.0, 16: 16.0}).paths == (), "no node is worth a whole step"
    # A node costs a quarter: the first, 0.5 likely, is worth it, (0, 0) and (1), 0.2 likely, are not.
    assert optimised(RATES, {1: 1.0, 2: 1.25, 16: 1.25 + 14 * 0.25}).paths == ((0,),)


def test_cost_between_the_measured_points():
    points = {1: 2.0, 4: 3.5, 8: 5.5}
    assert [interpolated(points, x) for x in (1, 2, 4, 6, 8, 20)] == [2.0, 2.5, 3.5, 4.5, 5.5, 5.5]


def named(name, depth=4, vocabulary=100):
    return named_tree(str(name), depth, vocabulary, chain(2))


def test_trees_by_name_and_by_file(tmp_path):
    assert named("auto") == chain(2) and named("chain") == chain(4)
    assert named("mc_sim_7b_63") is NAMED["mc_sim_7b_63"]
    (tmp_path / "t.json").write_text("[[1], [0], [1, 3]]")
    assert named(tmp_path / "t.json").paths == ((0,), (1,), (1, 3))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[[0], [0", "not valid JSON"),
        ("[" * 100_000 + "]" * 100_000, "not valid JSON"),
        ('{"0": 1}', "list of lists"),
        ("[[0], [true]]", "list of lists"),
        ("[[0], [-1]]", "list of lists"),
        ("[]", "list of lists"),
        ("[0, 1]", "list of lists"),
        ("[[0], []]", "root"),
        ("[[0], [1, 0]]", r"no parent: \[1\]"),
        ("[[0], [0]]", "twice"),
        ("[[0], [100]]", "vocabulary"),
        (json.dumps([[0] * n for n in range(1, 6)]), "5 deep, but there are 4 heads"),
    ],
)
def test_a_bad_file_is_the_users_error(content, words, tmp_path):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(UserError, match=words):
        named(tmp_path / "t.json")


def test_an_absent_file_says_which_names_there_are(tmp_path):
    with pytest.raises(UserError, match="mc_sim_7b_63"):
        named(tmp_path / "absent.json")
    with pytest.raises(UserError, match="4 deep, but there are 2 heads"):
        named("mc_sim_7b_63", depth=2)
