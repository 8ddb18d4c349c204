"""A changed, missing or added file of an artifact is refused on load, and named."""

import json
import shutil

import pytest
from convert_case import make_teacher

from linearize_cli import convert, load
from linearize_cli.artifact.seal import seal
from linearize_cli.cli import main
from linearize_cli.errors import UserError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    teacher = make_teacher(tmp_path_factory.mktemp("checksums"))
    convert(teacher.path, teacher.folder / "saved", train=False, seq_len=16)
    return teacher.folder / "saved"


@pytest.fixture
def artifact(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def flip(path, at=-3):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


CHANGES = {
    "changed: model.safetensors": lambda folder: flip(folder / "model.safetensors"),
    "changed: config.json": lambda folder: edit(folder / "config.json", rms_norm_eps=1e-4),
    "changed: modeling_linearized.py": lambda folder: flip(folder / "modeling_linearized.py", 5),
    "changed: tokenizer.json": lambda folder: flip(folder / "tokenizer.json", -40),
    "changed: recipe.yaml": lambda folder: (folder / "recipe.yaml").write_text("name: other\n"),
    "missing: linearize_kernels_state.py": lambda folder: (folder / "linearize_kernels_state.py").unlink(),
    "new: chat_template.jinja": lambda folder: (folder / "chat_template.jinja").write_text("{{ 1 }}"),
}


def edit(path, **keys):
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


@pytest.mark.parametrize("named", CHANGES)
def test_the_file_is_named(named, artifact):
    CHANGES[named](artifact)
    with pytest.raises(UserError, match=f"those that were saved: {named}") as refusal:
        load(artifact)
    assert "linearize seal" in refusal.value.hint


def test_a_change_on_purpose_loads_when_asked_or_sealed(artifact, capsys):
    edit(artifact / "generation_config.json", max_length=7)
    command = ["generate", str(artifact), "a", "--max-new", "2", "-q"]
    assert ended(command) == 2 and "changed: generation_config.json" in capsys.readouterr().err
    assert ended([*command, "--no-checksums"]) == 0
    seal(artifact)
    assert ended(command) == 0


def test_other_files_and_files_without_a_record_are_not_looked_at(artifact):
    (artifact / "notes.txt").write_text("mine")
    (artifact / "README.md").write_text("edited")
    load(artifact)
    flip(artifact / "model.safetensors")
    (artifact / "linearize.json").unlink()  # as in a folder that `save_pretrained` wrote
    load(artifact)


def ended(command):
    with pytest.raises(SystemExit) as end:
        main(command)
    return end.value.code or 0
