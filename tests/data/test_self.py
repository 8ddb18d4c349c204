"""`--data self`: what the teacher writes, and that it need not write it twice."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from convert_case import SMALL, make_teacher
from transformers import AutoModelForCausalLM, AutoTokenizer

from linearize_cli import convert
from linearize_cli.data import self_generated as sample
from linearize_cli.errors import UserError
from linearize_cli.terminal import Terminal
from linearize_cli.training.text import NamedText

BOS, EOS = 1, 2
LENGTH = 9


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("self"))


@pytest.fixture
def model(teacher):
    """The teacher, less sure of itself, so that its documents end."""
    model = AutoModelForCausalLM.from_pretrained(teacher.path).eval()
    model.lm_head.weight.data *= 0.3
    return model


@pytest.fixture
def tokenizer(teacher):
    return AutoTokenizer.from_pretrained(teacher.path)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setattr(sample, "corpus_cache", lambda key: tmp_path / "cache" / key)
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


@pytest.fixture
def batches(monkeypatch):
    """Counts the batches that are sampled."""
    done, original = [], sample.sample

    def counting(*arguments):
        done.append(1)
        return original(*arguments)

    monkeypatch.setattr(sample, "sample", counting)
    return done


def write(model, tokenizer, path, tokens=2000, seed=0):
    sample.write_corpus(model, tokenizer, path, tokens, LENGTH, seed, Terminal(quiet=True))
    return path.read_bytes()


def test_documents_go_from_bos_to_the_end_or_the_limit(model, tokenizer):
    torch.manual_seed(0)
    rows = sample.sample(model, tokenizer, LENGTH)
    assert len(rows) == sample.ROWS and all(row[0] == BOS for row in rows)
    assert not any(end in row[1:] for row in rows for end in (BOS, EOS))
    lengths = {len(row) for row in rows}
    assert len(lengths) > 2 and max(lengths) == LENGTH


@torch.no_grad()
def test_text_is_drawn_from_the_model_as_it_is(model, tokenizer, monkeypatch):
    """How often each token comes second, and which comes third behind the commonest, within four deviations."""
    monkeypatch.setattr(sample, "ROWS", 3000)
    cuts = dict(top_k=1, repetition_penalty=3.0, use_cache=False, do_sample=False)
    model.generation_config.update(**cuts)
    before = model.generation_config.to_dict()
    torch.manual_seed(0)
    rows = sample.sample(model, tokenizer, 3)
    assert model.generation_config.to_dict() == before

    def agree(tokens, prefix):
        p = model(torch.tensor([prefix])).logits[0, -1].softmax(-1)
        ends = (p[EOS] + p[BOS]) * (len(prefix) > 1)  # no document is empty
        p[[BOS, EOS]] = torch.stack([torch.zeros(()), ends])
        p /= p.sum()
        n = len(tokens)
        counts = torch.tensor(tokens).bincount(minlength=len(p))
        assert ((counts - n * p).abs() < 4 * (n * p * (1 - p)).sqrt() + 1).all()
        return int(p.masked_fill(torch.arange(len(p)) == EOS, 0).argmax())

    second = agree([int(row[1]) for row in rows], [BOS])
    follows = [row for row in rows if row[1] == second]
    agree([int(row[2]) if len(row) > 2 else EOS for row in follows], [BOS, second])


def test_the_corpus_holds_as_many_tokens_as_asked_for(model, tokenizer, tmp_path):
    lines = write(model, tokenizer, tmp_path / "a.jsonl").splitlines()
    counts = [json.loads(line)["tokens"] for line in lines]
    assert 2000 <= sum(counts) < 2000 + sample.ROWS * LENGTH
    assert len(lines) % sample.ROWS == 0 and min(counts) < LENGTH


@pytest.mark.parametrize("left", [0, 1, 700, 4000, None])
def test_an_interrupted_corpus_goes_on_as_if_it_had_not_been(model, tokenizer, tmp_path, cache, left):
    whole = write(model, tokenizer, tmp_path / "a.jsonl")
    shutil.rmtree(cache)
    cache.mkdir()
    (tmp_path / "b.jsonl").write_bytes(whole[:left])
    assert write(model, tokenizer, tmp_path / "b.jsonl") == whole


def test_what_was_written_is_not_written_again(model, tokenizer, tmp_path, cache, batches):
    short = write(model, tokenizer, tmp_path / "short.jsonl", 700)
    first = len(batches)
    assert write(model, tokenizer, tmp_path / "again.jsonl", 700) == short and len(batches) == first
    long = write(model, tokenizer, tmp_path / "long.jsonl", 2000)
    assert long.startswith(short) and len(long) > len(short)
    total = len(batches)
    assert total * sample.ROWS == len(long.splitlines())
    assert write(model, tokenizer, tmp_path / "less.jsonl", 700) == short and len(batches) == total
    (kept,) = cache.iterdir()
    assert kept.read_bytes() == long


def test_another_teacher_writes_its_own(model, tokenizer, tmp_path, cache):
    write(model, tokenizer, tmp_path / "a.jsonl", 100)
    write(model, tokenizer, tmp_path / "b.jsonl", 100, seed=1)
    with torch.no_grad():
        model.lm_head.weight[3, 3] += 1e-3
    write(model, tokenizer, tmp_path / "c.jsonl", 100)
    tokenizer.add_tokens("hound")
    write(model, tokenizer, tmp_path / "d.jsonl", 100)
    model.config.rope_parameters["rope_theta"] = 77.0
    write(model, tokenizer, tmp_path / "e.jsonl", 100)
    assert len(list(cache.iterdir())) == 5


def test_half_a_corpus_is_never_kept(model, tokenizer, tmp_path, cache, monkeypatch):
    def full(source, target):
        target.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(sample.shutil, "copyfile", full)
    assert write(model, tokenizer, tmp_path / "a.jsonl", 100)
    assert list(cache.iterdir()) == []


def test_self_and_a_file_share_the_training(teacher, monkeypatch):
    opened, split = [], NamedText.split

    def watching(text):
        opened.append([source.count for source in text.sources])
        split(text)
        opened.append((text.train, text.evaluation))
        opened.append(["".join(document) for document in text.train.documents()])

    monkeypatch.setattr(NamedText, "split", watching)
    changes = {**SMALL, "data": (teacher.text, "self"), "eval_data": teacher.text, "batch_size": 4}
    report = convert(teacher.path, teacher.folder / "mixed", **changes)
    assert report["perplexity"]["recovered"] > 0
    (file, own), (train, held), documents = opened
    assert file == held.count == 200 and own > 20 and train.count == file + own
    lines = [json.loads(line)["text"] for line in Path(teacher.text).read_text().splitlines()]
    assert documents[0] == lines[0] and documents[1] not in lines and documents[2] == lines[1]


def test_missing_data_is_refused_before_anything_is_written(teacher, batches):
    for changes in ({"eval_data": "absent.jsonl"}, {"data": ("self", "absent.jsonl")}):
        with pytest.raises(UserError, match="no such data: absent"):
            convert(teacher.path, teacher.folder / "out", **{**SMALL, "data": ("self",), **changes})
    assert not batches and not list(teacher.folder.glob("out*"))
