"""The files of a folder that are pushed, and the folders that are refused."""

import os

import pytest
from fake_artifact import write_artifact

from linearize_cli.artifact.completeness import artifact_files
from linearize_cli.errors import UserError


@pytest.fixture
def artifact(tmp_path):
    return write_artifact(tmp_path / "tiny-augmented")


def missing(name):
    return lambda artifact: (artifact / name).unlink()


def text(name, content):
    return lambda artifact: (artifact / name).write_text(content)


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (missing("config.json"), "no config.json"),
        (missing("linearize.json"), "no linearize.json"),
        (missing("recipe.yaml"), "no recipe.yaml"),
        (missing("README.md"), "no README.md"),
        (missing("tokenizer.json"), "no vocabulary"),
        (missing("model.safetensors"), "no model*.safetensors"),
        (missing("modeling_linearized.py"), "no modeling_linearized.py, which auto_map names"),
        (text("config.json", '{"model_type": "llama"}'), "model_type 'llama', not 'linearized'"),
        (text("config.json", '{"model_type": "linearized"}'), "no auto_map for AutoModelForCausalLM"),
        (text("linearize.json", "{"), "linearize.json is not valid JSON"),
        (text("linearize.json", "[]"), "linearize.json is not a JSON object"),
        (text("medusa.safetensors", ""), "medusa.safetensors is broken"),
        (lambda artifact: os.truncate(artifact / "model.safetensors", 9000), "model.safetensors is broken"),
        (
            text("model.safetensors.index.json", '{"weight_map": {"x": "model-2.safetensors"}}'),
            "no model-2.safetensors, which the index names",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_folder_which_is_not_whole_is_refused(artifact, damage, fault):
    damage(artifact)
    with pytest.raises(UserError, match="not a whole linearize artifact") as refused:
        artifact_files(artifact)
    assert fault in refused.value.what and "linearize convert" in refused.value.hint


def test_every_fault_is_named_at_once(tmp_path):
    with pytest.raises(UserError) as refused:
        artifact_files(tmp_path)
    for name in ("config.json", "recipe.yaml", "model*.safetensors"):
        assert f"no {name}" in refused.value.what


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no folder .*nowhere"):
        artifact_files(tmp_path / "nowhere")
