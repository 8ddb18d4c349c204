"""`eval` and `bench` write what they measured into the model card, unless a user has edited it."""

import json
import shutil

import pytest
from convert_case import make_teacher
from encoders import tiny_model as tiny_encoder
from encoders import tokenizer

from linearize_cli import bench, convert, evaluate
from linearize_cli.checksums import sha256
from linearize_cli.terminal import Terminal


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    teacher = make_teacher(tmp_path_factory.mktemp("cards"))
    options = dict(data=(teacher.text,), overrides=("attention.local.size=8",), keep_softmax="at:1")
    convert(teacher.path, teacher.folder / "saved", train=False, seq_len=16, seed=3, **options)
    return teacher


@pytest.fixture
def artifact(teacher, tmp_path):
    return shutil.copytree(teacher.folder / "saved", tmp_path / "copy")


def record(folder):
    return json.loads((folder / "linearize.json").read_text())


def test_the_card_has_the_command_without_paths(artifact, teacher):
    command = (
        "linearize convert teacher --method augmented --data text.jsonl --keep-softmax at:1 --seq-len 16 "
        "--batch-size 8 --seed 3 --set attention.local.size=8 --no-train"
    )
    assert record(artifact)["command"] == command
    text = (artifact / "README.md").read_text()
    assert command in text and str(teacher.folder) not in text


def test_measurements_are_shown(artifact, teacher):
    before = (artifact / "README.md").read_text()
    assert "## Speed" not in before
    bench(artifact, context=(16,), seconds=0)
    found = evaluate(artifact, data=teacher.text, context=(16,), tokens=300)
    text = (artifact / "README.md").read_text()
    assert "## Speed" in text and "| decode | 1 | 16 |" in text and "![bench](bench.png)" in text
    assert f"the perplexity is {found['perplexity']['student']:,.3f}" in text
    assert record(artifact)["card"] == sha256(artifact / "README.md")


def test_an_edited_card_stays(artifact):
    (artifact / "README.md").write_text("mine")
    bench(artifact, context=(16,), seconds=0)
    assert (artifact / "README.md").read_text() == "mine"


def test_what_was_measured_is_not_lost_for_a_damaged_file(artifact, capsys):
    (artifact / "eval.json").write_text('{"perplexity": {"student": 3}}')
    (artifact / "README.md").write_bytes(b"\xe9")
    assert bench(artifact, context=(16,), seconds=0, terminal=Terminal())["rows"]
    assert "the model card was not written again: KeyError" in capsys.readouterr().err
    assert (artifact / "README.md").read_bytes() == b"\xe9"


@pytest.mark.parametrize("family", ["bert-body", "roberta-classifier"])
def test_the_card_of_an_encoder(family, tmp_path):
    tiny_encoder(family).save_pretrained(tmp_path / family)
    tokenizer().save_pretrained(tmp_path / family)
    overrides = ("attention.local.size=4", "attention.conv.width=3")
    convert(str(tmp_path / family), tmp_path / "out", train=False, seq_len=32, overrides=overrides)
    (tmp_path / "text.txt").write_text("a fox sat " * 400)
    found = evaluate(tmp_path / "out", data=str(tmp_path / "text.txt"), context=(32,), tokens=300)
    text = (tmp_path / "out" / "README.md").read_text()
    assert record(tmp_path / "out")["card"] == sha256(tmp_path / "out" / "README.md")
    assert ("distance of the embeddings" in text) == bool(found["embeddings"])
