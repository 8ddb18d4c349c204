"""Random changes to an artifact are refused by load, verify and push with the file named, or are proved harmless."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from convert_case import make_teacher, run

from linearize_cli import load
from linearize_cli.artifact.completeness import artifact_files
from linearize_cli.artifact.record import SEALED
from linearize_cli.checksums import check_folder, is_loaded
from linearize_cli.errors import UserError
from linearize_cli.metrics.evaluation import evaluate
from linearize_cli.verification import artifact as checks
from linearize_cli.verification.check import FAIL
from linearize_cli.verification.verify import verify

CHANGES = 200
REPORT = "linearize.json"
ADDED = [
    "vocab.json",
    "adapter_config.json",
    "chat_template.jinja",
    "model-00001-of-00002.safetensors",
    "notes.txt",
]
IDS = torch.tensor([[1, 3, 4, 5, 3, 3, 5, 4, 4, 3]])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    teacher = make_teacher(tmp_path_factory.mktemp("changes"))
    folder = teacher.folder / "saved"
    run(teacher, folder, train=False, keep_softmax="at:1")
    evaluate(folder, data=teacher.text, tokens=512)
    verify(folder, quick=True)
    return folder


def flip(folder, rng, name):
    data = bytearray((folder / name).read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    (folder / name).write_bytes(data)
    return {name}


def edit(folder, rng, name):
    """Change, remove or add a key at any depth of a JSON or YAML file."""
    form = yaml if name.endswith(".yaml") else json
    data = (yaml.safe_load if form is yaml else json.loads)((folder / name).read_text())
    place = data
    while isinstance(inner := place[rng.choice(sorted(place))], dict) and inner and rng.random() < 0.7:
        place = inner
    key, kind = rng.choice(sorted(place)), rng.randrange(3)
    if kind == 0:
        place["another"] = 1
    elif kind == 1:
        del place[key]
    else:
        place[key] = place[key] + 1 if type(place[key]) in (int, float) else ["changed"]
    (folder / name).write_text(form.dump(data) if form is yaml else json.dumps(data))
    return {name}


def delete(folder, rng, name):
    (folder / name).unlink()
    return {name}


def swap(folder, rng, name):
    other = rng.choice([path.name for path in folder.iterdir() if path.name != name])
    one, two = (folder / name).read_bytes(), (folder / other).read_bytes()
    (folder / name).write_bytes(two)
    (folder / other).write_bytes(one)
    return set() if one == two else {name, other}


def add(folder, rng, name):
    new = rng.choice(ADDED)
    shutil.copy(folder / name, folder / new)
    return {new}


def applied(folder, number):
    """Make the change with this number, and return the names of the files that differ."""
    rng = random.Random(number)
    kind = [flip, edit, delete, swap, add][number % 5]
    names = sorted(path.name for path in folder.iterdir())
    if kind is edit:
        names = [
            "config.json",
            "generation_config.json",
            "recipe.yaml",
            "tokenizer_config.json",
            REPORT,
            *SEALED,
        ]
        names.remove("bench.json")
    return kind, kind(folder, rng, rng.choice(names))


def contents(path):
    """The meaning of a JSON file, which spaces do not change, and the bytes of others. None if there is no file."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return path.read_bytes()


def refusal(action, folder):
    """The error of an action, or the text that it returns. None if it neither fails nor finds anything."""
    try:
        found = action(folder)
    except (UserError, ValueError) as error:
        return str(error)
    return found if action is verified else None


def verified(folder):
    """Return the reason why `verify` refuses a folder: its check of the files fails, or it cannot load them."""
    lines = checks.files(SimpleNamespace(artifact=folder)).lines
    said = next((line.measured for line in lines if line.verdict == FAIL), None)
    if said is None:
        load(folder, checksums=False)
    return said


def unchanged(folder, saved, name):
    """True if the contents of a file are those that were saved. The sum of a report, which says no more, may be
    missing."""
    old, new = contents(saved / name), contents(folder / name)
    return new == old or name in (REPORT, *SEALED) and new == {k: v for k, v in old.items() if k != "sum"}


def test_random_changes_are_refused_or_harmless(saved, tmp_path):
    expected, kinds = logits(saved), set()
    for number in range(CHANGES):
        folder = shutil.copytree(saved, tmp_path / "copy")
        kind, names = applied(folder, number)
        names = {name for name in names if not unchanged(folder, saved, name)}
        loaded = {name for name in names if is_loaded(Path(name))}
        gone = not (folder / REPORT).exists()  # then there are no sums to compare with
        edited = (
            names & {REPORT, *SEALED}
            if gone
            else {n for n in names & {REPORT, *SEALED} if (folder / n).exists()}
        )
        needed = {
            load: set() if gone else loaded | edited & {REPORT},
            check_folder: set() if REPORT in names else loaded,
            verified: {REPORT} if gone else loaded | edited,
            artifact_files: {REPORT} if gone else loaded | edited,
        }
        for action, files in needed.items():
            said = refusal(action, folder)
            where = (number, kind.__name__, names, action.__name__, said)
            assert not files or (said and any(file in said for file in files)), where
        if not needed[load] and not loaded:
            assert torch.equal(logits(folder), expected), (number, kind.__name__, names)
        kinds.add((kind.__name__, bool(loaded), bool(edited)))
        shutil.rmtree(folder)
    assert len(kinds) > 10


def logits(folder):
    model, _ = load(folder)
    with torch.no_grad():
        return model(IDS).logits


def test_the_artifacts_own_code_compares_the_sums(saved, tmp_path):
    """In a process without this package."""
    folder = shutil.copytree(saved, tmp_path / "copy")
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    code = (
        "import sys; sys.modules.update(linearize_cli=None, linearize_kernels=None)\n"
        "from transformers import AutoModelForCausalLM as Auto\n"
        f"load = lambda **k: Auto.from_pretrained({str(folder)!r}, trust_remote_code=True, **k)\n"
        "print(type(load(checksums=False)).__name__)\n"
        "load()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "LinearizedLlamaForCausalLM", done.stderr
    assert "ValueError" in done.stderr and "changed: model.safetensors" in done.stderr
