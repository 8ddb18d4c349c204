"""Every command in the README and in docs/ runs, and every page that they link to is there."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from loopback_hub import TOKEN, LoopbackHub

import linearize_cli
from linearize_cli.cli import cli
from linearize_cli.cli import main as linearize
from linearize_cli.metrics import benchmark

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "kernels/README.md",
]
# Words that stand for a user's own values.
VALUES = {
    "N": "1",
    "K": "1",
    "TOKENS": "1000",
    "FILE.yaml": "recipe.yaml",
    "auto:N": "auto:1",
    "auto:6": "auto:1",
}
VALUES |= {"NAME": "augmented", "PROMPT": "The coat of", "TEXT": "my-text.txt"}
ARTIFACTS = ("Llama-2-7b-augmented", "demo-augmented", "demo-swapped", "ARTIFACT", "A", "B", "C")
MODELS = ("meta-llama/Llama-2-7b", "meta-llama/Llama-2-7b-hf", "meta-llama/Meta-Llama-3-70B", "MODEL")
TEXTS = ("my-text.txt", "my-text.jsonl", "other-text.jsonl")
# Options that make a command small. Given last, they replace those of the documentation.
SMALL = {
    "convert": "--tokens 1k --seq-len 64 --batch-size 2 --eval-tokens 512 --dtype float32",
    "heads": "--tokens 1k --seq-len 64 --batch-size 2 --force",
    "eval": "--tokens 512 --context 64",
    "bench": "--context 64",
    "verify": "--quick --max-new 8",
    "generate": "--max-new 8",
}
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


def parsed(page, line):
    """The words of a documented command: options of the whole program, and the command with its own words. None for a
    command that is only mentioned.
    """
    words = [VALUES.get(word, word) for word in shlex.split(line)[1:] if word not in ("...", "…", "|")]
    with click.Context(cli, info_name="linearize") as group:
        arguments = cli.make_parser(group).parse_args(words)[1] if words else []
        if not arguments or arguments[0] == "COMMAND":
            return None
        name, *rest = arguments
        command = cli.commands.get(name)
        assert command, f"{page.name}: {line}: there is no command {name}"
        try:
            command.make_context(name, rest, parent=group)
        except click.exceptions.Exit:
            return words  # --help
        except click.MissingParameter:
            # A mention without its arguments.
            assert all(word.startswith("-") for word in rest) or len(rest) < 2, f"{page.name}: {line}"
            return None
        except click.NoSuchOption as error:
            pytest.fail(f"{page.name}: {line}: {error.message}")
    return words


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a model, its text, and an artifact with Medusa heads."""
    folder = tmp_path_factory.mktemp("docs")
    demo = Path(linearize_cli.__file__).parent / "demo"
    shutil.copytree(demo / "teacher", folder / "model")
    lines = (demo / "heldout.jsonl").read_text().splitlines()
    (folder / "text").write_text("\n".join(lines[:60]))
    linearize_cli.convert("demo", folder / "artifact", train=False)
    run(["heads", str(folder / "artifact"), *SMALL["heads"].split(), "--data", "demo"])
    return folder


@pytest.fixture(scope="module")
def ran():
    """The commands that have run. Pages repeat some of them with other names."""
    return set()


def run(words):
    """Run a command in this process. It must end with exit code 0."""
    with pytest.raises(SystemExit) as end:
        linearize(words)
    assert not end.value.code, f"{words} ended with exit code {end.value.code}"


def workplace(words, made, folder):
    """Put the models, artifacts and texts that a command names into a folder. Return the folder in which the command
    runs: an artifact's, if the command names none.
    """
    for before, word in zip(words, words[1:], strict=False):
        if before == "-o":
            continue
        source = "artifact" if word in ARTIFACTS else "model" if word in MODELS else None
        if source:
            shutil.copytree(made / source, folder / word)
        elif word in TEXTS:
            shutil.copy(made / "text", folder / word)
    if {*words} & {*ARTIFACTS, *MODELS, "demo", "methods"}:
        return folder
    shutil.copytree(made / "artifact", folder / "artifact")
    return folder / "artifact"


@pytest.mark.parametrize(
    ("page", "line"), CASES, ids=lambda value: value.name if isinstance(value, Path) else value
)
def test_a_documented_command_runs(page, line, made, ran, tmp_path, monkeypatch):
    words = parsed(page, line)
    if not words or words[0] == "serve":
        return  # tests/serving runs the server
    same = " ".join("" if word in (*ARTIFACTS, *MODELS, *TEXTS) else word for word in words).strip()
    if same in ran:
        return
    ran.add(same)
    monkeypatch.setattr(benchmark, "SECONDS", 0.1)
    if "--no-train" not in words:
        words += SMALL.get(words[0], "").split()
        if words[0] == "convert" and "--data" not in words:
            words += ["--data", "my-text.txt"]
    monkeypatch.chdir(workplace(words, made, tmp_path))
    if words[0] != "push":
        return run(words)
    with LoopbackHub({TOKEN: "me"}) as hub:
        home = {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path),
            "HF_TOKEN": TOKEN,
        }
        command = [sys.executable, "-m", "linearize_cli", *words, "--yes"]
        environment = os.environ | home | {"NO_PROXY": "127.0.0.1"}
        pushed = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert pushed.returncode == 0, pushed.stderr


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
