"""`verify` compares an artifact with what was saved: its code, its files, and what it computed."""

import json
import shutil

import pytest
import torch
from families import swapped
from safetensors.torch import load_file, save_file

from linearize_cli.artifact.record import summed
from linearize_cli.artifact.seal import seal
from linearize_cli.errors import UserError
from linearize_cli.files import write_json
from linearize_cli.verification import verify as verification
from linearize_cli.verification.forms import forms
from linearize_cli.verification.report import sentence
from linearize_cli.verification.verify import verify


@pytest.fixture(scope="module")
def sealed(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("sealed") / "tiny"
    swapped("llama", num_hidden_layers=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "linearize.json").write_text('{"base_model": "tiny"}')
    seal(folder)
    return folder


@pytest.fixture
def artifact(sealed, tmp_path, monkeypatch):
    """A copy, of which nothing but the folder is checked."""
    monkeypatch.setattr(verification, "DECODING", {"forms": forms})
    monkeypatch.setattr(verification, "THOROUGH", {})
    monkeypatch.setattr(verification, "MEASURING", {})
    return shutil.copytree(sealed, tmp_path / "tiny")


def verified(folder, **options) -> list[str]:
    report = verify(folder, prompts=None, max_new=2, quick=True, **options)
    assert json.dumps(report, allow_nan=False)
    assert (report["verdict"] == "FAIL") == bool(report["failed"])
    return report["failed"]


def edit(path, line: str, fault: str) -> None:
    text = path.read_text()
    assert text.count(line) == 1
    path.write_text(text.replace(line, fault))


@pytest.mark.parametrize("trust", [False, True])
def test_an_untouched_artifact_is_exact(artifact, trust):
    report = verify(artifact, max_new=2, quick=True, trust_remote_code=trust)
    assert (report["verdict"], report["failed"]) == ("EXACT", [])
    assert report["code"] == {"ran": "artifact" if trust else "package", "differs": []}
    assert report["fingerprint"]["max_abs_diff"] < 1e-6 and report["fingerprint"]["tokenizer"]


def test_other_code_than_the_packages_is_named(artifact):
    edit(
        artifact / "linearize_runtime_layer.py",
        "return out.transpose(1, 2)",
        "return 9 * out.transpose(1, 2)",
    )
    assert verified(artifact) == ["code", "files"]
    assert verified(artifact, trust_remote_code=True) == ["files", "fingerprint"]
    seal(artifact)  # by this package's code
    assert verified(artifact) == ["code"]
    assert verified(artifact, trust_remote_code=True) == ["fingerprint"]


def test_a_fault_of_one_form_in_the_artifacts_own_code(artifact):
    line, fault = "self.state, self.owned = state.compact(), False", "self.state, self.owned = state.map("
    edit(artifact / "linearize_runtime_cache.py", line, f"{fault}lambda x: 0 * x), False")
    seal(artifact, trust_remote_code=True)
    assert verified(artifact, trust_remote_code=True) == ["prefill_vs_decode", "chunked_vs_decode"]


def test_a_missing_code_file_is_named(artifact):
    (artifact / "linearize_kernels_reference_block.py").unlink()
    assert verified(artifact) == ["code", "files"]
    with pytest.raises(UserError, match="missing: linearize_kernels_reference_block.py"):
        verify(artifact, trust_remote_code=True)


def test_a_missing_record_is_no_pass(artifact):
    (artifact / "linearize.json").unlink()
    assert verified(artifact) == ["files"]


def test_what_a_person_reads(artifact):
    record = json.loads((artifact / "linearize.json").read_text())
    (artifact / "linearize.json").write_text('{"base_model": "tiny"}')
    unsealed = verify(artifact, max_new=2, quick=True)
    assert sentence(unsealed).startswith("the files have no checksums to compare with")
    (artifact / "linearize.json").write_text(json.dumps(record))
    (artifact / "generation_config.json").unlink()
    (artifact / "linearize_runtime_layer.py").write_text("")
    said = sentence(verify(artifact, max_new=2, quick=True))
    assert "code, files" in said and "--trust-remote-code" in said and "linearize seal" in said


def test_a_flipped_weight_byte(artifact):
    path = artifact / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x08  # the last weight's exponent
    path.write_bytes(data)
    assert verified(artifact) == ["files", "fingerprint"]
    data[-1], data[-4] = data[-1] ^ 0x08, data[-4] ^ 0x01  # the last weight's last bit, less than rounding
    path.write_bytes(data)
    assert verified(artifact) == ["files"]


def test_a_swapped_weight_of_the_same_file_size(artifact):
    weights = load_file(artifact / "model.safetensors")
    name = "model.layers.0.self_attn.linear_attention.conv"
    save_file(
        {**weights, name: weights[name].flip(-1).contiguous()},
        artifact / "model.safetensors",
        {"format": "pt"},
    )
    assert "fingerprint" in verified(artifact)


def test_an_edited_epsilon(artifact):
    config = json.loads((artifact / "config.json").read_text())
    config["rms_norm_eps"] = 1e-2
    (artifact / "config.json").write_text(json.dumps(config))
    assert verified(artifact) == ["files", "fingerprint"]


def test_a_swapped_tokenizer(artifact):
    path = artifact / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    words = tokenizer["model"]["vocab"]
    words["e"], words["o"] = words["o"], words["e"]
    path.write_text(json.dumps(tokenizer))
    assert verified(artifact) == ["files", "fingerprint"]


def test_seal_renews_after_a_deliberate_change(artifact):
    config = json.loads((artifact / "config.json").read_text())
    (artifact / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-2}))
    found = seal(artifact)
    assert found["changed"] == "changed: config.json" and found["files"] > 30
    assert verified(artifact) == []
    assert seal(artifact)["changed"] == ""


def test_the_card_and_figures_are_no_part_of_the_seal(artifact):
    for name in ("README.md", "eval-recall.png", "log.jsonl"):
        (artifact / name).write_text("changed")
    assert verified(artifact) == []


@pytest.mark.parametrize("name", ["verify.json", "eval.json", "bench.json"])
def test_a_report_has_a_sum_of_its_own(name, artifact):
    write_json(artifact / name, summed({"verdict": "FAIL", "rows": [1.5, {"a": None}]}))
    assert verify(artifact, max_new=2, quick=True, write=False)["failed"] == []
    edit(artifact / name, "FAIL", "EXACT")
    report = verify(artifact, max_new=2, quick=True, write=False)
    assert report["failed"] == ["files"] and name in report["files"]["changed"]


@pytest.mark.parametrize(
    "record, failed",
    [
        ("{}", []),
        ('{"fingerprint": {"dtype": "float32"}}', ["fingerprint"]),
        ('{"fingerprint": {"dtype": "int8"}}', ["fingerprint"]),
        (
            '{"fingerprint": {"dtype": "float32", "seed": 1, "tokenizer": [], "sequences": 3}}',
            ["fingerprint"],
        ),
    ],
)
def test_records_that_are_not_whole(artifact, record, failed):
    (artifact / "linearize.json").write_text(record)
    assert verified(artifact) == failed


@pytest.mark.parametrize("record", ["not JSON", '{"fingerprint": 5}', '{"checksums": {"config.json": 3}}'])
def test_records_of_another_form_are_refused(artifact, record):
    (artifact / "linearize.json").write_text(record)
    with pytest.raises(UserError, match="linearize.json"):
        verified(artifact)


def test_rounded_weights_have_another_fingerprint(artifact):
    """It is not compared in a narrower dtype than the saved one's."""
    assert verified(artifact, dtype="bfloat16") == []


def test_a_fingerprint_of_half_precision_is_computed_in_fp32(sealed, tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(verification, "DECODING", {})
    monkeypatch.setattr(verification, "MEASURING", {})
    folder = tmp_path / "half"
    swapped("llama", num_hidden_layers=2).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "linearize.json").write_text('{"base_model": "tiny"}')
    seal(folder)
    assert json.loads((folder / "linearize.json").read_text())["fingerprint"]["dtype"] == "float32"
    for dtype in (None, "float32"):
        report = verify(folder, max_new=2, quick=True, dtype=dtype)
        assert report["failed"] == [] and report["fingerprint"]["max_abs_diff"] < 1e-6


def test_what_cannot_be_sealed(tmp_path, sealed):
    with pytest.raises(UserError, match="is not a folder"):
        seal(tmp_path / "absent")
    folder = shutil.copytree(sealed, tmp_path / "tiny")
    (folder / "linearize.json").unlink()
    with pytest.raises(UserError, match="no linearize.json"):
        seal(folder)
