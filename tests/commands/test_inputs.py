"""Every input that a user names is read, or refused with exit code 2 and a short message, whatever it holds."""

import time
import warnings

import pytest

from linearize_cli import cli
from linearize_cli.commands.options import notices
from linearize_cli.errors import LINES, WIDTH, Notice, UserError
from linearize_cli.inputs import (
    JSON_BYTES,
    YAML_BYTES,
    read_json,
    read_text,
    read_yaml,
    user_path,
    without_surrogates,
)
from linearize_cli.terminal import Terminal

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


def run(capsys, *arguments):
    """The exit code of a command and its error."""
    with pytest.raises(SystemExit) as end:
        cli.main(list(arguments))
    return end.value.code or 0, capsys.readouterr().err


@pytest.mark.parametrize("name", ["x" * 300, "~nosuchuser/x", "a\0b", "a\ud83db"])
def test_a_name_that_no_file_system_takes(name):
    with pytest.raises(UserError, match="cannot be used as a path"):
        user_path(name)


def test_a_name_that_is_not_there_yet(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/new") == tmp_path / "new"


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "{}"],
        ["verify", "{}"],
        ["eval", "{}"],
        ["bench", "{}"],
        ["heads", "{}"],
        ["push", "{}"],
        ["generate", "{}", "a"],
        ["methods", "{}.yaml"],
        ["methods", "--json", "{}"],
        ["convert", "demo", "-o", "{}", "--no-train"],
        ["convert", "{}", "--no-train"],
        ["convert", "demo", "--data", "{}", "--dry-run"],
        ["convert", "demo", "--method", "{}.yaml", "--dry-run"],
    ],
    ids=" ".join,
)
def test_every_command_refuses_such_a_name(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("x" * 300, "~nosuchuser/x"):
        code, message = run(capsys, *(argument.format(name) for argument in arguments))
        assert code == 2 and "path" in message and len(message.splitlines()) <= LINES
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("prompt", ["half an emoji \ud83d", "\udcff", "a\0b"])
def test_an_argument_that_is_not_text(prompt, capsys):
    code, message = run(capsys, "generate", "demo", prompt)
    assert code == 2 and "argument 3 is not valid UTF-8" in message


def test_a_byte_order_mark_is_left_out(tmp_path):
    for content in ("{}", "[1]"):
        (tmp_path / "file").write_bytes(b"\xef\xbb\xbf" + content.encode())
        assert read_text(tmp_path / "file") == content
        assert read_json(tmp_path / "file") == read_yaml(tmp_path / "file")


@pytest.mark.parametrize("content", [b"\xff\xfe{\0}\0", b"", b"{", b"[" * 100_000, b"9" * 5000, b"nul"])
def test_what_is_no_json(content, tmp_path):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError, match="file (is not valid JSON|cannot be read)"):
        read_json(tmp_path / "file")


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        "[" * 6000 + "]" * 6000,
        "{" * 6000,
        "- " * 6000,
        "a: " + "9" * 5000,
        "a: 0x" + "f" * 5000,
        "!!int x",
        "!!timestamp x",
        "!!bool x",
        "!!python/object:os.system x",
        "? [a]\n: b",
        "\x00",
        "a: [",
    ],
    ids=lambda text: text[:12],
)
def test_what_is_no_plain_yaml_is_refused_at_once(text, tmp_path):
    (tmp_path / "file.yaml").write_text(text)
    started = time.process_time()
    with pytest.raises(UserError, match=r"file\.yaml is not valid YAML") as refused:
        read_yaml(tmp_path / "file.yaml")
    assert time.process_time() - started < 5, "it is refused before it is expanded"
    assert len(str(refused.value).splitlines()) <= LINES


def test_dates_are_text(tmp_path):
    (tmp_path / "file").write_text("a: 2020-99-99\nb: 2020-01-01")
    assert read_yaml(tmp_path / "file") == {"a": "2020-99-99", "b": "2020-01-01"}


def test_a_file_that_is_too_large(tmp_path):
    with (tmp_path / "file").open("wb") as stream:
        stream.truncate(JSON_BYTES + 1)
    for read in (read_json, read_yaml):
        with pytest.raises(UserError, match="larger than"):
            read(tmp_path / "file")
    assert YAML_BYTES < JSON_BYTES


def test_lone_surrogates_are_replaced():
    assert without_surrogates({"a\ud83d": ["\udc00b", 1, None]}) == {"a\ufffd": ["\ufffdb", 1, None]}
    assert without_surrogates("🦊") == "🦊"


def test_a_message_is_short_whatever_it_quotes():
    message = str(UserError("x" * 10_000 + "\n" + "y\n" * 50, "What to do.")).splitlines()
    assert len(message) == LINES and all(len(line) <= WIDTH for line in message)
    assert message[-1] == "What to do." and message[0].startswith("xxx") and message[0].endswith("xxx")
    assert str(UserError("short", "hint")) == "short\nhint"


def test_usage_errors_are_short_too(capsys):
    code, message = run(capsys, "generate", "demo", "a", "--seed", "9" * 6000)
    assert code == 2 and max(map(len, message.splitlines())) <= WIDTH + 100


def test_notices_are_lines_on_the_terminal(capsys):
    with notices(Terminal()):
        warnings.warn("left out: [/x]", Notice, stacklevel=1)
    assert capsys.readouterr().err == "left out: [/x]\n"
    with notices(Terminal(quiet=True)):
        warnings.warn("left out", Notice, stacklevel=1)
    assert not capsys.readouterr().err
