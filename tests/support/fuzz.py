"""Files of every kind that users name, changed at random, through the real commands in this process."""

import json
import random
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import yaml
from convert_case import SIZES, make_teacher, run
from meta_format import meta_shards, tiny_llama, write_byte_tokenizer, write_meta

from linearize_cli.cli import main

SECONDS, LINES, WIDTH = 20, 10, 1000
ODD = (
    *(None, True, False, 0, -1, 1, 7, 10**6, 2**31, 10**30, 0.5, -2.0, 1e308, float("inf"), float("nan")),
    *(
        "",
        "x",
        "x" * 5000,
        "\ud83d",
        "\0",
        "../../etc/passwd",
        "/",
        "~nosuchuser",
        "1e3",
        "auto",
        "null",
        "🦊",
    ),
    *([], [1], {}, {"a": 1}, [[[[]]]], ["a"] * 3, {"": None}),
)
JUNK = (
    b"",
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b'"',
    b"{",
    b"[" * 6000,
    b"9" * 5000,
    b"\n",
    b"&a *a",
    b"- ",
    b"\\ud83d",
)


@dataclass(frozen=True)
class Target:
    """A kind of file: its path, its contents as they are written, and the commands that read it, in turn."""

    path: Path
    content: bytes
    commands: tuple[Callable[[int], list[str]], ...]
    load: Callable[[bytes], object] = json.loads
    dump: Callable[[object], bytes] = lambda data: json.dumps(data).encode()


@dataclass(frozen=True)
class Outcome:
    code: int
    seconds: float
    message: str

    @property
    def fault(self) -> str | None:
        """Return what is wrong with the outcome, or None."""
        lines = self.message.splitlines()
        if self.code not in (0, 1, 2):
            return f"exit code {self.code}"
        if self.seconds > SECONDS:
            return f"{self.seconds:.0f} seconds"
        return "a long message" if len(lines) > LINES or any(len(x) > WIDTH for x in lines) else None


def targets(folder: Path) -> dict[str, Target]:
    """Write a whole file of each kind, and all that its commands need, into a folder."""
    teacher = make_teacher(folder)
    artifact, meta = folder / "artifact", folder / "meta"
    run(teacher, artifact, medusa_heads=2, tokens=128)
    model = tiny_llama()
    write_meta(meta, meta_shards(model.state_dict(), model.config, 1, 0))
    write_byte_tokenizer(meta)
    recipe, tree, rows = folder / "own.yaml", folder / "tree.json", folder / "rows.jsonl"
    recipe.write_text((artifact / "recipe.yaml").read_text())
    tree.write_text("[[0], [1], [0, 0], [0, 1]]")
    lines = Path(teacher.text).read_text().splitlines()[:40]
    chat = [{"role": "user", "content": "a fox"}, {"role": "assistant", "content": "sat"}]
    rows.write_text("\n".join([*lines, json.dumps({"messages": chat})]) + "\n")
    template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    (Path(teacher.path) / "chat_template.jinja").write_text(template)
    small = [part for size in SIZES for part in ("--set", size)]

    def swap(*options: str) -> Callable[[int], list[str]]:
        return lambda i: [
            *("convert", teacher.path, "-o", str(folder / f"out{i}"), "--no-train", "--seq-len", "16"),
            *("-q", *small, *options),
        ]

    inspect = lambda i: ["inspect", teacher.path, "-q"]  # noqa: E731
    generate = lambda i: ["generate", str(artifact), "a fox", "--max-new", "2", "-q"]  # noqa: E731
    drafted = lambda i: [*generate(i), "--speculative", "medusa", "--tree", str(tree)]  # noqa: E731
    evaluate = lambda i: ["eval", str(artifact), "--data", teacher.text, "--context", "16", "-q"]  # noqa: E731
    push = lambda i: ["push", str(artifact), "owner/name", "--dry-run", "--no-verify", "-q"]  # noqa: E731
    heads = lambda i: ["heads", str(artifact), "--force", "--tokens", "64", "--heads", "1", "-q"]  # noqa: E731

    def target(path: Path, *commands: Callable, **forms: Callable) -> Target:
        return Target(path, path.read_bytes(), commands, **forms)

    return {
        "config.json": target(Path(teacher.path) / "config.json", inspect, swap()),
        "artifact": target(artifact / "config.json", generate),
        "tokenizer": target(
            Path(teacher.path) / "tokenizer.json", inspect, swap("--eval-data", teacher.text)
        ),
        "tokenizer_config": target(Path(teacher.path) / "tokenizer_config.json", inspect),
        "heads": safetensors(
            artifact / "medusa.safetensors", lambda i: [*generate(i), "--speculative", "medusa"]
        ),
        "recipe": target(
            recipe,
            lambda i: ["methods", str(recipe), "-q"],
            swap("--dry-run", "--method", str(recipe)),
            load=yaml.safe_load,
            dump=lambda data: yaml.safe_dump(data).encode(errors="surrogatepass"),
        ),
        "params.json": target(meta / "params.json", lambda i: ["inspect", str(meta), "-q"]),
        "tree": target(tree, drafted),
        "linearize.json": target(artifact / "linearize.json", push, evaluate, push, heads),
        "rows": target(rows, swap("--eval-data", str(rows)), load=read_rows, dump=write_rows),
        "header": safetensors(Path(teacher.path) / "model.safetensors", inspect),
    }


def read_rows(content: bytes) -> list:
    return [json.loads(line) for line in content.splitlines()]


def write_rows(rows: list) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def safetensors(path: Path, *commands: Callable[[int], list[str]]) -> Target:
    """A file of weights, of which the header is data."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")

    def dump(header: object) -> bytes:
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + size :]

    return Target(path, content, commands, lambda whole: json.loads(whole[8 : 8 + size]), dump)


def mutated(target: Target, chance: random.Random) -> bytes:
    """The contents of a file with one to three changes, of values or of bytes."""
    content = target.content
    if chance.random() < 0.75:
        data = target.load(content)
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            data = changed(data, chance)
        try:
            return target.dump(data)
        except (ValueError, TypeError, IndexError):
            return content[: chance.randrange(len(content))]
    for _ in range(chance.randint(1, 3)):
        place = chance.randrange(min(len(content), 4096) + 1)
        kind = chance.randrange(3)
        if kind == 0:
            content = content[:place]
        elif kind == 1:
            content = content[:place] + chance.choice(JUNK) + content[place:]
        else:
            content = content[:place] + bytes([chance.randrange(256)]) + content[place + 1 :]
    return content


def changed(data: object, chance: random.Random) -> object:
    """Data with one value, at any depth, replaced, removed or joined by another."""
    inside = isinstance(data, dict | list) and data
    if not inside or chance.random() < 0.05:
        return chance.choice(ODD)
    keys = list(data) if isinstance(data, dict) else range(len(data))
    key, copied = chance.choice(keys), data.copy()
    kind = chance.random()
    if kind < 0.1:
        del copied[key]
    elif kind < 0.15 and isinstance(data, dict):
        copied[chance.choice(["extra", "\ud83d", "a" * 500])] = chance.choice(ODD)
    else:
        copied[key] = changed(data[key], chance)
    return copied


def attempt(target: Target, name: str, number: int) -> Outcome:
    """Change a file, run the command that reads it, and put the file back."""
    target.path.write_bytes(mutated(target, random.Random(f"{name} {number}")))
    out, err, started = StringIO(), StringIO(), time.monotonic()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main(target.commands[number % len(target.commands)](number))
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        target.path.write_bytes(target.content)
    return Outcome(code, time.monotonic() - started, err.getvalue())
