"""Before a push, an artifact is loaded without this package, and verified."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from convert_case import make_teacher
from encoders import tiny_model as tiny_encoder
from encoders import tokenizer
from families import tiny_model
from huggingface_hub import snapshot_download
from loopback_hub import TOKEN
from safetensors.torch import load_file, save_file

from linearize_cli import convert, load
from linearize_cli.artifact.record import write_record
from linearize_cli.artifact.seal import seal
from linearize_cli.checksums import checksums
from linearize_cli.cli import main
from linearize_cli.errors import CheckFailed, UserError
from linearize_cli.publish import gate
from linearize_cli.publish.gate import check_loads_alone, check_publishable, other_code

pytest_plugins = ["push_case"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    teacher = make_teacher(tmp_path_factory.mktemp("gate"))
    convert(teacher.path, teacher.folder / "saved", train=False, seq_len=16)
    return teacher.folder / "saved"


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def files(folder):
    return sorted(x.relative_to(folder).as_posix() for x in folder.rglob("*") if x.is_file())


def record(folder):
    return json.loads((folder / "linearize.json").read_text())


def test_an_artifact_passes_and_is_pushed(push, hub, saved):
    pushed = push(saved, "alice/tiny", verify=True)
    assert pushed.code == 0, pushed.output
    assert hub.repos["alice/tiny"].files()["config.json"] == (saved / "config.json").read_bytes()


def test_nothing_is_sent_of_an_artifact_that_does_not_pass(push, hub, copied):
    path = copied / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    save_file({**weights, name: 2 * weights[name]}, path, metadata={"format": "pt"})
    whole = record(copied)
    write_record(copied, {**whole, "checksums": checksums(copied)})
    refused = push(copied, "alice/tiny", verify=True)
    assert refused.code == 1 and "logits differ from those recorded" in refused.data["what"]
    assert "alice/tiny" not in hub.repos and "--no-verify" in refused.data["hint"]


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("modeling_linearized.py", "import no_such_module\n", "no_such_module"),
        ("modeling_linearized.py", "from linearize_cli import load\n", "linearize_cli"),
        ("config.json", "{", "json"),
    ],
)
def test_it_must_load_without_this_package(copied, file, text, said):
    (copied / file).write_text(text if file == "config.json" else text + (copied / file).read_text())
    with pytest.raises(CheckFailed, match="does not load where this package is not installed") as failed:
        check_loads_alone(copied, files(copied))
    assert said.lower() in failed.value.what.lower()


def test_code_of_others_does_not_run_unasked(copied, monkeypatch):
    assert other_code(copied, files(copied)) == []
    with (copied / "modeling_linearized.py").open("a") as file:
        file.write("\n# mine\n")
    (copied / "linearize_own_map.py").write_text("1 / 0\n")
    monkeypatch.setattr(gate, "check_loads_alone", lambda *arguments: pytest.fail("its code ran"))
    with pytest.raises(UserError, match="linearize_own_map.py, modeling_linearized.py") as refused:
        check_publishable(copied, files(copied), trust_remote_code=False, note=print)
    assert "--trust-remote-code" in refused.value.hint


@pytest.mark.parametrize("target", ["sub/code.Tokenizer", "owner/name--code.Tokenizer", "json.Tokenizer"])
def test_a_class_of_others_that_a_config_names_does_not_run_unasked(copied, target):
    path = copied / "tokenizer_config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoTokenizer": [None, target]}})
    )
    assert other_code(copied, files(copied)) == [target]


def test_a_module_in_the_working_folder_does_not_run(copied, tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise SystemExit('mine ran')\n")
    monkeypatch.chdir(tmp_path)
    check_loads_alone(copied, files(copied))


def test_a_damaged_fingerprint_is_named(copied):
    whole = record(copied)
    for fingerprint in ({"x": 1}, {**whole["fingerprint"], "sequences": [{"length": 3}]}):
        write_record(copied, {**whole, "fingerprint": fingerprint})
        with pytest.raises(CheckFailed, match="fingerprint in .* is incomplete"):
            check_loads_alone(copied, files(copied))


@pytest.mark.parametrize("family", ["bert", "roberta-classifier", "t5"])
def test_other_kinds_of_models_pass(family, tmp_path):
    tiny_encoder(family).save_pretrained(tmp_path / family)
    tokenizer(sentinels=family == "t5").save_pretrained(tmp_path / family)
    overrides = ("attention.local.size=4", "attention.conv.width=3")
    convert(str(tmp_path / family), tmp_path / "out", train=False, seq_len=32, overrides=overrides)
    check_loads_alone(tmp_path / "out", files(tmp_path / "out"))


ALONE = """
import json, sys
sys.modules.update(linearize_cli=None, linearize_kernels=None)
import torch, transformers
folder, kind = sys.argv[1:]
loader = getattr(transformers, kind)
model = loader.from_pretrained(folder, dtype="auto", trust_remote_code=True).eval()
ids = torch.tensor([[3, 9, 4, 7, 5, 8, 6, 3, 9, 4, 4, 5]])
print(json.dumps(model.generate(ids, max_new_tokens=20, do_sample=False).tolist()))
"""


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("mixtral", "bfloat16"),
        ("bart", "float32"),
        *(pytest.param(name, "float32", marks=pytest.mark.slow) for name in ("gemma2", "lfm2")),
    ],
)
def test_a_download_generates_the_same_tokens_without_this_package(push, hub, tmp_path, family, dtype):
    """Sharded, and: experts in bf16, tied embeddings, a hybrid, an encoder-decoder."""
    folder, encoder = tmp_path / "teacher", family == "bart"
    (tiny_encoder(family) if encoder else tiny_model(family)).to(getattr(torch, dtype)).save_pretrained(
        folder
    )
    tokenizer(sentinels=encoder).save_pretrained(folder)
    overrides = ("attention.local.size=4", "attention.conv.width=3")
    out = tmp_path / "out"
    convert(str(folder), out, train=False, seq_len=32, overrides=overrides)
    model, _ = load(out, dtype=dtype)
    (out / "model.safetensors").unlink()
    model.save_pretrained(out, max_shard_size="40KB")
    seal(out)
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert push(out, "alice/tiny").code == 0
    copy = snapshot_download("alice/tiny", endpoint=hub.url, token=TOKEN, local_dir=tmp_path / "copy")
    kind = "AutoModelForSeq2SeqLM" if encoder else "AutoModelForCausalLM"
    done = subprocess.run([sys.executable, "-c", ALONE, copy, kind], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ids = torch.tensor([[3, 9, 4, 7, 5, 8, 6, 3, 9, 4, 4, 5]])
    expected = load(out, dtype=dtype)[0].generate(ids, max_new_tokens=20, do_sample=False)
    assert json.loads(done.stdout.splitlines()[-1]) == expected.tolist()


def test_weights_that_are_not_finite_are_named(copied):
    path = copied / "model.safetensors"
    weights = load_file(path)
    save_file({name: torch.full_like(w, torch.nan) for name, w in weights.items()}, path, {"format": "pt"})
    write_record(copied, {**record(copied), "checksums": checksums(copied)})
    with pytest.raises(CheckFailed, match="not a finite number"):
        check_loads_alone(copied, files(copied))


def test_the_command_says_what_it_does(copied, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "x")
    with pytest.raises(SystemExit) as end:
        main(["push", str(copied), "alice/tiny", "--dry-run"])
    said = capsys.readouterr()
    assert end.value.code in (None, 0) and "alice/tiny" in said.out
    assert "without this package" in said.err and "checking tree" in said.err


def test_a_gated_base_model_is_published_on_purpose_only(push, hub, copied):
    whole = record(copied)
    write_record(copied, {**whole, "origin": {"gated": True}})
    refused = push(copied, "alice/tiny")
    assert refused.code == 2 and "is gated" in refused.data["what"] and "--yes" in refused.data["hint"]
    assert "alice/tiny" not in hub.repos
    assert push(copied, "alice/tiny", yes=True).code == 0
