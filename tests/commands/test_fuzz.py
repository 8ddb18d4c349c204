"""Files that were changed at random end commands in 0, 1 or 2, in time and with a short message."""

import pytest
from fuzz import attempt, targets

FAST, ALL = range(8), range(300)
NAMES = (
    "config.json",
    "artifact",
    "recipe",
    "params.json",
    "tree",
    "linearize.json",
    "rows",
    "header",
    "heads",
)
NAMES += ("tokenizer", "tokenizer_config")
SLOW = ("rows", "linearize.json", "tokenizer")  # commands that measure or train


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return targets(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize(
    "numbers", [pytest.param(FAST, id="some"), pytest.param(ALL, id="all", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", NAMES)
def test_a_changed_file(name, numbers, files):
    outcomes = {number: attempt(files[name], name, number) for number in numbers}
    faults = {number: (x.fault, x.message[-300:]) for number, x in outcomes.items() if x.fault}
    assert not faults


def test_an_unchanged_file_is_taken(files, monkeypatch):
    assert {*files} == {*NAMES}
    monkeypatch.setattr("fuzz.mutated", lambda target, chance: target.content)
    quick = {name: target for name, target in files.items() if name not in SLOW}
    assert {name: attempt(target, name, 0).code for name, target in quick.items()} == dict.fromkeys(quick, 0)
