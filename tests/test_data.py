"""Text sources: what they yield, in what order, and how they refuse."""

import json
from itertools import islice

import pytest
import torch
from tiny_checkpoint import save_tokenizer
from transformers import AutoTokenizer

from linearize_cli.errors import UserError
from linearize_cli.recover import data


@pytest.fixture
def tokenizer(tmp_path):
    save_tokenizer(tmp_path / "tokenizer")
    return AutoTokenizer.from_pretrained(tmp_path / "tokenizer")


def jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def read(source):
    return ["".join(document) for document in source.documents()]


def test_files_of_each_kind(tmp_path):
    import pyarrow
    import pyarrow.parquet

    jsonl(tmp_path / "a.jsonl", ["a fox", "", "sat"])
    pyarrow.parquet.write_table(pyarrow.table({"text": ["p q", "r"]}), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_text("one document\nof two lines\n")
    (tmp_path / "ignored.bin").write_bytes(b"\x00")
    assert read(data.open_source(str(tmp_path / "a.jsonl"))) == ["a fox", "sat"]
    source = data.open_source(str(tmp_path))
    assert read(source) == ["a fox", "sat", "p q", "r", "one document\nof two lines\n"]
    assert source.count == 5
    assert read(data.joined([source, source])) == read(source) * 2


def test_a_long_text_is_read_in_pieces_that_cut_no_line(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PIECE", 10)
    (tmp_path / "long.txt").write_text("a line of words\n" * 9)
    (document,) = data.open_source(str(tmp_path / "long.txt")).documents()
    pieces = list(document)
    assert len(pieces) > 3 and "".join(pieces) == "a line of words\n" * 9
    assert all(piece.endswith("\n") for piece in pieces)


def test_blocks_join_documents_each_with_its_bos(tmp_path, tokenizer):
    source = data.open_source(str(jsonl(tmp_path / "a.jsonl", ["a fox", "sat", "a a a"])))
    bos, a, fox, sat = 1, 3, 4, 5
    assert [b.tolist() for b in data.blocks(source, tokenizer, 4)] == [[bos, a, fox, bos], [sat, bos, a, a]]


def test_batches_repeat_the_source_and_resume_anywhere(tmp_path, tokenizer):
    source = data.open_source(str(jsonl(tmp_path / "a.jsonl", ["a fox sat"] * 3 + ["fox"] * 4)))
    all_at_once = list(islice(data.batches(source, tokenizer, 4, 2), 9))
    for skip in (1, 4, 8):
        resumed = next(data.batches(source, tokenizer, 4, 2, skip=skip))
        assert torch.equal(resumed, all_at_once[skip])


def test_the_last_hundredth_is_held_out(tmp_path):
    source = data.open_source(str(jsonl(tmp_path / "a.jsonl", [f"text {i}" for i in range(250)])))
    kept, held = data.hold_out(source)
    assert read(held) == ["text 248", "text 249"]
    assert read(kept) + read(held) == read(source)


def test_the_demo_text_is_a_source():
    source = data.open_source("demo")
    assert len(list(islice(source.documents(), 3))) == 3 and source.count > 1000


def test_a_dataset_of_the_hub_is_streamed(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    jsonl(folder / "train.jsonl", ["x", "y"])
    source = data.hub_source(f"{folder}::train")
    assert read(source) == ["x", "y"] and source.count is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["holds no text"]),
        ('{"text": ""}\n', ["holds no text"]),
        ('{"text": "a"}\n{"body": "b"}\n', ["line 2", "`text`"]),
        ("not json\n", ["line 1"]),
        ('{"text": 3}\n', ["line 1", "no string"]),
        ("[1]\n", ["line 1"]),
    ],
)
def test_bad_jsonl_is_refused_with_its_line(content, words, tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text(content)
    with pytest.raises(UserError) as error:
        data.open_source(str(file))
    assert all(word in str(error.value) for word in [*words, "bad.jsonl"])


def test_what_is_no_data_is_refused(tmp_path, tokenizer):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    (tmp_path / "noise.txt").write_bytes(bytes(range(128, 256)))
    (tmp_path / "some.csv").write_text("a,b")
    jsonl(tmp_path / "one.jsonl", ["a fox"])
    for name, words in {
        "absent.jsonl": "no such data",
        "empty": "holds no",
        "empty.txt": "holds no text",
        "cut.parquet": "cannot read",
        "noise.txt": "no UTF-8 text",
        "some.csv": "its ending",
    }.items():
        with pytest.raises(UserError, match=words):
            data.open_source(str(tmp_path / name))
    one = data.open_source(str(tmp_path / "one.jsonl"))
    with pytest.raises(UserError, match="single document"):
        data.hold_out(one)
    with pytest.raises(UserError, match="shorter than one block of 64"):
        data.evaluation_blocks(one, tokenizer, 64)
    with pytest.raises(UserError, match="shorter than one block of 64"):
        next(data.batches(one, tokenizer, 64, 2))
