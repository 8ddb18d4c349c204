"""A folder with the files of a whole artifact, in their smallest form: for tests that run no model."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file


def write_artifact(folder: Path) -> Path:
    folder.mkdir()
    auto_map = {
        "AutoConfig": "configuration_linearized.LinearizedConfig",
        "AutoModelForCausalLM": "modeling_linearized.LinearizedForCausalLM",
    }
    record = {
        "base_class": "LlamaForCausalLM",
        "base_model_type": "llama",
        "method": "augmented",
        "attention": {"far": {"feature_map": "relu"}},
        "layers": {},
        "softmax": [],
    }
    write_json(
        folder / "config.json", {"model_type": "linearized", "auto_map": auto_map, "linearize": record}
    )
    write_json(folder / "linearize.json", {"schema": 1, "base_model": "demo", "method": "augmented"})
    write_json(folder / "tokenizer.json", {"model": {"vocab": {"a": 0}}})
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    (folder / "recipe.yaml").write_text("name: augmented\n")
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n\n# tiny\n")
    (folder / "configuration_linearized.py").write_text("class LinearizedConfig: ...\n")
    (folder / "modeling_linearized.py").write_text("class LinearizedForCausalLM: ...\n")
    save_weights(folder / "model.safetensors")
    return folder


def write_json(path: Path, content):
    path.write_text(json.dumps(content))


def save_weights(path: Path, seed: int = 0):
    save_file({"weight": np.random.default_rng(seed).standard_normal((64, 64), np.float32)}, path)
