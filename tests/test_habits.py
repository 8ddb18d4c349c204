"""Habits of the source that can be tested: how docstrings begin, which words are used, how long help lines are."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from linearize_cli.cli import cli

ROOT = Path(__file__).parents[1]
FOLDERS = ("linearize_cli", "kernels/linearize_kernels", "benchmarks", "examples")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
# How the docstring of a function may begin. A verb that is missing here is welcome.
VERBS = set(
    """
    accept adapt add advance advise apply append assert ask attach attend average begin branch build bring
    cache call cast check choose clear clip close collect combine commit compare compile complete compute
    continue convert copy count create crop cut decide decode decorate delete derive describe detach
    determine disable divide do download draft draw drop encode end enter estimate evaluate exchange
    exclude expand explain export feed fetch fill find finish fold follow forget format forward
    freeze gather generate get give group handle hide hold identify import initialize insert install
    interrupt inspect iterate join judge keep lay leave let limit list load lock look loop make map mark
    mask match materialize measure merge move multiply name offload open order pack pad parse pass
    patch pick place plan plot predict prefill prefetch prepare print produce profile project
    propose prove push put quit raise read rebuild receive reconstruct record redact reduce refuse
    register release reload remember remove rename render renew reorder repeat replace replay report
    require reset resolve restore retry return reverse rewrite roll round run sample save scale
    scatter score search select send serve set share shorten show silence shrink shuffle simulate skip solve
    sort split start state stop store stream strip sum summarize swap switch take tell test time tie
    train transfer translate turn try undo unlock unpack update upload use validate verify view
    visit wait walk warn wrap write yield
    """.split()  # noqa: SIM905
)
# Words of our own that had a name in the field already.
PRIVATE = re.compile(r"\b(lanes?|scratch|tapes?|so many|goes on with|is told)\b")


def docstrings() -> Iterator[tuple[str, str]]:
    """Yield the place and the docstring of every function."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (text := ast.get_docstring(node)):
                yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", text


def test_docstrings_of_functions_begin_with_a_verb():
    commands = ROOT / "linearize_cli/commands"
    assert commands.is_dir()
    wrong = [
        f"{place}: {text.splitlines()[0]}" for place, text in docstrings() if first_word(text) not in VERBS
    ]
    assert not wrong, "\n".join(wrong)


def first_word(text: str) -> str:
    """Return the first word in lower case, without punctuation."""
    return re.split(r"[\s,.:;(]", text.strip(), maxsplit=1)[0].lower()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_private_words(path):
    lines = enumerate(path.read_text().splitlines(), 1)
    assert not [f"{number}: {line.strip()}" for number, line in lines if PRIVATE.search(line)]


def test_help_lines_are_short():
    for name, command in cli.commands.items():
        for option in command.params:
            if isinstance(option, click.Option):
                assert len(option.help or "") <= 80, f"{name} {option.opts[0]}: {option.help}"
