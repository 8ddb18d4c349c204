"""The model card: of a finished, an untrained and a local conversion, and what it must never say."""

import pytest
from huggingface_hub import ModelCard

from linearize_cli.artifact.card import card
from linearize_cli.models.origin import obstacle, origin

RECIPE = {
    "name": "augmented",
    "summary": "sliding softmax window + far features + masked conv",
    "paper": "arXiv 2406.07368, 2410.10254",
}


@pytest.fixture
def report():
    return {
        "schema": 1,
        "base_model": "meta-llama/Llama-2-7b",
        "method": "augmented:relu",
        "layers": {"linear": ["model.layers.0.self_attn"], "softmax": ["model.layers.1.self_attn"]},
        "tokens": {"transfer": 16_000_000, "distill": 24_000_000},
        "perplexity": {"teacher": 3.67, "swapped": 1234.5, "transferred": 4.01, "recovered": 3.79},
        "ablation": {"full": 3.79, "local_only": 5.25, "linear_only": 9.5},
        "self_check": {"incremental": 1.2e-6, "padded": 3.4e-7, "reload": 0.0},
        "state_bytes": 2_048_000,
        "kv_bytes_per_token": 1_024,
        "seconds": {"transfer": 61.25, "distill": 120.0},
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
    }


@pytest.fixture
def untrained(report):
    """With --no-train and without evaluation data: only what the swap itself gives."""
    return report | {
        "tokens": {"transfer": None, "distill": None},
        "perplexity": dict.fromkeys(report["perplexity"]),
        "ablation": None,
        "seconds": None,
        "kv_bytes_per_token": None,
    }


def rows(text: str) -> dict[str, str]:
    """The rows of all tables: label -> value."""
    cells = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return {label.strip(): value.strip() for label, value in cells}


def test_metadata_is_what_the_hub_reads(report):
    data = ModelCard(card(report, repo_name="llama-relu")).data
    assert data.base_model == "meta-llama/Llama-2-7b" and data.base_model_relation == "finetune"
    assert data.library_name == "transformers" and data.pipeline_tag == "text-generation"
    assert data.tags == ["linearize", "linear-attention", "augmented:relu"]
    (result,) = data.eval_results
    assert data.model_name == "llama-relu"
    assert (result.task_type, result.metric_type, result.metric_value) == (
        "text-generation",
        "perplexity",
        3.79,
    )


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        ({"swapped": 1234.5}, 1234.5),
        ({"swapped": 1234.5, "transferred": 4.01}, 4.01),
        ({"teacher": 3.67}, None),
    ],
)
def test_the_perplexity_in_the_metadata_is_of_the_saved_weights(report, measured, expected):
    report["perplexity"] = dict.fromkeys(report["perplexity"]) | measured
    results = ModelCard(card(report, repo_name="x")).data.eval_results
    assert (results[0].metric_value if results else None) == expected


def test_every_number_is_shown(report):
    text = card(report, repo_name="llama-relu", recipe=RECIPE)
    assert rows(text) == {
        "model": "perplexity",
        "teacher (softmax attention)": "3.670",
        "linear attention, before any training": "1,234.500",
        "after attention transfer": "4.010",
        "after distillation": "3.790",
        "ablation": "perplexity",
        "full model": "3.790",
        "local part only": "5.250",
        "linear part only": "9.500",
        "memory for decoding": "size",
        "state of the linear layers, per sequence": "2.0 MB",
        "KV cache that they replace, per token": "1.0 kB",
        "context at which the state becomes smaller, tokens": "2,001",
        "check": "difference",
        "one pass or token by token": "1.2e-06",
        "with or without padding": "3.4e-07",
        "before or after saving and loading": "0.0e+00",
        "---": "---:",
    }
    assert "in 1 of 2 attention layers" in text
    assert "- linear attention: `model.layers.0.self_attn`" in text
    assert "- softmax attention: `model.layers.1.self_attn`" in text
    assert "- training tokens: transfer 16,000,000, distill 24,000,000" in text
    assert "- seconds: transfer 61.2, distill 120.0" in text
    assert "- versions: torch 2.13.0, transformers 5.23.0" in text
    assert "`augmented:relu`: sliding softmax window" in text
    assert "[2406.07368](https://arxiv.org/abs/2406.07368)" in text


def test_what_was_not_run_is_not_measured(untrained):
    text = card(untrained, repo_name="x")
    values = rows(text)
    for label in ("teacher (softmax attention)", "after distillation", "full model"):
        assert values[label] == "not measured"
    assert values["context at which the state becomes smaller, tokens"] == "not measured"
    assert "- training tokens: transfer not measured, distill not measured" in text
    assert "- seconds: not measured" in text
    assert "None" not in text and "null" not in text
    assert ModelCard(text).data.eval_results is None


def test_the_code_that_loads_the_model_compiles(report):
    block = card(report, repo_name="alice/llama-relu").split("```python\n")[1].split("```")[0]
    compile(block, "README.md", "exec")
    assert 'path = "alice/llama-relu"' in block and "trust_remote_code=True" in block


def test_a_local_base_model_shows_its_name_only(report, tmp_path, monkeypatch):
    folder = tmp_path / "secret-place" / "my-llama"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for base_model in (
        str(folder),
        "secret-place/my-llama",
        "./secret-place/my-llama/",
        "/gone/secret-place/my-llama",
    ):
        report |= {"base_model": base_model, "method": "/home/secret-place/mine.yaml"}
        text = card(report, repo_name="x", recipe=RECIPE)
        assert "`my-llama`" in text and "`mine`" in text
        assert "secret-place" not in text and "/home" not in text and str(tmp_path) not in text
        data = ModelCard(text).data
        assert data.base_model is None and "base_model_relation" not in data


def test_the_demo_teacher_is_no_base_model_on_the_hub(report):
    text = card(report | {"base_model": "demo"}, repo_name="x")
    assert ModelCard(text).data.base_model is None and "The demo teacher with linear attention" in text


def test_the_licence_and_the_languages_of_the_base_model_are_carried_over(report, tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nlicense: other\nlicense_name: tiny\nlicense_link: https://example.org/l\nlanguage: en\n"
        "extra_gated_prompt: Agree?\n---\n# base\n"
    )
    found = origin(str(tmp_path))
    assert found["language"] == ["en"] and found["gated"] and "gated" in obstacle(found)
    text = card(report | {"origin": found}, repo_name="x")
    data = ModelCard(text).data
    assert (data.license, data.license_name, data.language) == ("other", "tiny", ["en"])
    assert "[tiny](https://example.org/l). It applies to this model too" in text
    assert "does not allow changed copies" in obstacle({"license": "cc-by-nd-4.0"})
    assert "does not allow" in obstacle({"license": "other", "license_name": "cc-by-nd-4.0, mit"})
    assert obstacle({"license": "apache-2.0"}) == "" == obstacle({})


@pytest.mark.parametrize("text", ["", "# no head", "---\n[", "---\nlicense: 3\n---\n"])
def test_a_base_model_whose_card_names_no_licence_has_none(text, tmp_path):
    assert origin(str(tmp_path / "none")) == {}
    (tmp_path / "README.md").write_text(text)
    assert origin(str(tmp_path)) == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\ufeff---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
        ("\n--- \nlicense: mit\n---", {"license": "mit"}),
        ("---\n# -----\nlicense: [mit]\n---\n", {"license": "mit"}),
        (
            "---\nlicense: [mit, cc-by-nd-4.0]\n---\n",
            {"license": "other", "license_name": "mit, cc-by-nd-4.0"},
        ),
        ("---\nlanguage: no\n---\n", {"language": ["no"]}),
        ("---\nlanguage: [en, no]\nlicense_link: [a]\n---\n", {"language": ["en", "no"]}),
        ("---\n- a\n---\n", {"unread": True}),
        ("---\nx: !!int ''\n---\n", {"unread": True}),
        ("---\nx: " + "[" * 3000 + "\n---\n", {"unread": True}),
    ],
)
def test_cards_as_people_write_them(text, expected, tmp_path):
    (tmp_path / "README.md").write_bytes(text.encode())
    assert origin(str(tmp_path)) == expected
    (tmp_path / "README.md").write_bytes("---\nlicense: é\n---\n".encode("latin-1"))
    assert origin(str(tmp_path)) == {"unread": True}


def test_the_method_is_told_in_two_sentences(report):
    local = {"scope": "sliding", "size": 64, "score": "softmax"}
    attention = {"local": local, "far": {"feature_map": "hedgehog"}, "sinks": 4, "memory": {"kind": "none"}}
    text = card(report, repo_name="x", recipe={**RECIPE, "attention": attention})
    assert (
        "A token attends to the last 64 tokens and the first 4 exactly (softmax attention). All older tokens are read "
        "through `hedgehog` features from a state of constant size." in text
    )
