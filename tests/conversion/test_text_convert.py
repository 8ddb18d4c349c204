"""Conversions on text of every kind: streams, chats and documents kept apart."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from convert_case import SMALL, losses, make_teacher
from transformers import AutoTokenizer

from linearize_cli import cli, convert
from linearize_cli.data import sources as data
from linearize_cli.errors import UserError
from linearize_cli.terminal import Terminal

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %} {% endfor %}"
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """With a chat template, and 1,200 chats of it as a dataset folder."""
    teacher = make_teacher(tmp_path_factory.mktemp("text"))
    tokenizer = AutoTokenizer.from_pretrained(teacher.path)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(teacher.path)
    rng = random.Random(1)
    (teacher.folder / "sets" / "chats").mkdir(parents=True)
    with (teacher.folder / "sets" / "chats" / "train.jsonl").open("w") as file:
        for _ in range(1200):
            messages = [
                {"role": role, "content": " ".join(rng.choices(["a", "fox", "sat"], k=rng.randint(2, 9)))}
                for role in ("user", "assistant")
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return teacher


@pytest.fixture
def notes(monkeypatch):
    found = []
    monkeypatch.setattr(Terminal, "note", lambda self, text: found.append(text))
    return found


def run(teacher, name, *options, **changes):
    output = teacher.folder / name
    overrides = (*SMALL["overrides"], *options)
    source = {"data": ("sets/chats:default",), "batch_size": 4}
    report = convert(teacher.path, output, **{**SMALL, **source, **changes, "overrides": overrides})
    return report, losses(output)


def test_a_stream_of_chats_is_all_that_is_needed(teacher, notes, monkeypatch):
    """Its first documents are measured on; each option changes what is learned."""
    monkeypatch.chdir(teacher.folder)
    few = {"tokens": 6 * 64}
    report, plain = run(teacher, "plain", **few)
    assert report["perplexity"]["teacher"] > 1
    _, apart = run(teacher, "apart", "recover.separate_documents=true", **few)
    _, said = run(teacher, "said", "recover.assistant_only=true", **few)
    first, last = ("transfer", 1), ("distill", 4)
    assert plain[first] == said[first] != apart[first]  # every token is transferred
    assert len({run[last] for run in (plain, apart, said)}) == 3
    assert not any("mark what the assistant says" in note for note in notes)


def test_a_template_without_marks_is_said(teacher, notes, monkeypatch):
    monkeypatch.chdir(teacher.folder)
    shutil.copytree(teacher.path, teacher.folder / "unmarked")
    tokenizer = AutoTokenizer.from_pretrained(teacher.folder / "unmarked")
    tokenizer.chat_template = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    tokenizer.save_pretrained(teacher.folder / "unmarked")
    unmarked = teacher._replace(path=str(teacher.folder / "unmarked"))
    run(unmarked, "all", "recover.assistant_only=true", tokens=200)
    assert any("does not mark the assistant's words" in note for note in notes)


def test_a_tokenizer_without_a_template_is_refused(teacher, monkeypatch):
    monkeypatch.chdir(teacher.folder)
    other = make_teacher(teacher.folder / "plain-teacher")
    before = sorted(teacher.folder.iterdir())
    with pytest.raises(UserError, match="no chat template"):
        run(teacher._replace(path=other.path), "refused")
    assert sorted(teacher.folder.iterdir()) == before


def test_perplexity_is_that_of_the_joined_text(teacher, monkeypatch):
    monkeypatch.chdir(teacher.folder)
    changes = {"eval_data": teacher.text, "tokens": 200}
    plain, _ = run(teacher, "joined", **changes)
    apart, _ = run(teacher, "joined-apart", "recover.separate_documents=true", **changes)
    for name in ("teacher", "swapped"):
        assert plain["perplexity"][name] == apart["perplexity"][name]


def test_a_resumed_run_reads_on_where_it_stopped(teacher):
    """Batches are the same from any point on, in a text that is read several times over."""
    tokenizer = AutoTokenizer.from_pretrained(teacher.path)
    source = data.joined(
        [data.open_source(teacher.text), data.open_source(str(teacher.folder / "sets" / "chats"))]
    )
    options = dict(separate=True, assistant_only=True)
    whole = data.batches(source, tokenizer, 64, 16, **options)
    for step in range(40):
        batch = next(whole)
        if step in (1, 17, 39):
            again = next(data.batches(source, tokenizer, 64, 16, skip=step, **options))
            for name in ("ids", "starts", "counted"):
                assert torch.equal(getattr(batch, name), getattr(again, name))


def test_rows_that_cannot_be_used_stop_a_run_before_it_starts_or_are_left_out(teacher, capsys):
    """In every command that reads text: no row of them is trained or measured on, and their number is said."""
    lines = Path(teacher.text).read_text().splitlines()
    bad, clean, output = (
        teacher.folder / "bad.jsonl",
        teacher.folder / "clean.jsonl",
        teacher.folder / "skipping",
    )
    clean.write_text("\n".join(lines))
    bad.write_text("\n".join([*lines[:90], '{"text": 3}', *lines[90:], '{"text": ["a"]}']))
    sizes = [part for size in SMALL["overrides"] for part in ("--set", size)]
    budget = ["--tokens", "1280", "--seq-len", "16", "--batch-size", "4"]
    for first, *rest in (
        ("convert", teacher.path, "-o", str(output), *sizes, *budget),
        ("heads", str(output), "--heads", "1", *budget),
        ("eval", str(output), "--context", "16"),
    ):
        with pytest.raises(SystemExit) as end:
            cli.main([first, *rest, "--data", str(bad), "--skip-bad-rows", "1"])
        assert end.value.code == 2 and "bad.jsonl, line 20" in capsys.readouterr().err
        assert first != "convert" or not list(teacher.folder.glob("skipping*"))
        if first == "convert":
            with pytest.raises(SystemExit) as end:
                cli.main([first, *rest, "--data", str(bad), "--skip-bad-rows", "2"])
            said = capsys.readouterr().err
            assert not end.value.code and said.count("skipped rows that cannot be used: 2") == 1
    assert losses(output) == run(teacher, "clean", data=(str(clean),), tokens=1280)[1]
