"""Every command in the README and in docs/ is one that the command line accepts, and every page that they link to is
there."""

import re
import shlex
from pathlib import Path

import click
import pytest

import linearize_cli
from linearize_cli.cli import cli

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "kernels/README.md",
]
# Words that stand for a user's own values.
VALUES = {"N": "1", "K": "1", "TOKENS": "1000", "FILE.yaml": "recipe.yaml", "auto:N": "auto:1"}
PROMPT = re.compile(r"^(?:accelerate launch [^|]*?-m |\$ )?(?:\.venv/bin/)?(linearize(?:_cli)? .+)$")


def commands(page):
    """The commands of a page: lines of code blocks, and inline code, that begin with `linearize`."""
    text = page.read_text()
    blocks = re.findall(r"^```(?:sh|bash)?\n(.*?)^```", text, re.S | re.M)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))
    found = [PROMPT.match(" ".join(line.split())) for line in (*lines, *inline)]
    return [match[1].split(" #")[0] for match in found if match]


CASES = [(page, line) for page in PAGES for line in dict.fromkeys(commands(page))]


@pytest.mark.parametrize(
    ("page", "line"), CASES, ids=lambda value: value.name if isinstance(value, Path) else value
)
def test_a_documented_command_is_accepted(page, line):
    words = [VALUES.get(word, word) for word in shlex.split(line)[1:] if word not in ("...", "…", "|")]
    with click.Context(cli, info_name="linearize") as group:
        arguments = cli.make_parser(group).parse_args(words)[1] if words else []
        if not arguments:
            return  # `linearize --help`
        name, *rest = arguments
        if name == "COMMAND":
            return
        command = cli.commands.get(name)
        assert command, f"there is no command {name}"
        try:
            command.make_context(name, rest, parent=group)
        except click.exceptions.Exit:
            pass  # --help
        except click.MissingParameter:
            assert (
                all(word.startswith("-") for word in rest) or len(rest) < 2
            )  # a mention without its arguments
        except click.NoSuchOption as error:
            pytest.fail(f"{page.name}: {line}: {error.message}")


def test_the_pages_have_commands():
    assert len(CASES) > 40 and {page.name for page, _ in CASES} >= {"README.md", "scale.md", "serving.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_links_of_a_page_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text()):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", file.read_text(), re.M)
            assert anchor in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_functions_of_the_python_page_exist():
    text = (ROOT / "docs/python-api.md").read_text()
    named = set(re.findall(r"linearize_cli\.(\w+)\(", text)) | set(re.findall(r"^\| `(\w+)\(", text, re.M))
    assert named == set(linearize_cli.__all__)
    assert all(callable(getattr(linearize_cli, name)) for name in named)
