"""`eval` and `bench` write what they measured into the model card, unless a user has edited it."""

import json
import shutil

import pytest
from convert_case import make_teacher

from linearize_cli import bench, convert, evaluate
from linearize_cli.artifact.checksums import sha256


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
        "linearize convert teacher --method augmented --data text.jsonl --keep-softmax at:1 --seq-len 16 --batch-size 8 "
        "--seed 3 --set attention.local.size=8 --no-train"
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
