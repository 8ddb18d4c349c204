"""The model card (README.md) of an artifact, made from its `linearize.json`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from linearize_cli.artifact import card_measured
from linearize_cli.artifact.record import DISTANCES
from linearize_cli.models.encoders import Embedding
from linearize_cli.models.gguf import SUFFIX, split_name
from linearize_cli.models.tasks import TASKS, CausalLM, auto_class_of
from linearize_cli.tables import size

NOT_MEASURED = "not measured"

PERPLEXITY = {
    "teacher": "teacher (softmax attention)",
    "swapped": "linear attention, before any training",
    "transferred": "after attention transfer",
    "recovered": "after distillation",
}
ABLATION = {
    "full": "full model",
    "local_only": "local part only",
    "linear_only": "linear part only",
}
SELF_CHECK = {
    "incremental": "one pass or token by token",
    "padded": "with or without padding",
    "reload": "before or after saving and loading",
}
GENERATE = """
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0], skip_special_tokens=True))
"""
SENTENCES = (
    " With sentence-transformers: `SentenceTransformer(path, trust_remote_code=True)`. The model's own output "
    "is a hidden state per token."
)


def card(
    report: dict, *, repo_name: str, recipe: dict | None = None, measured: dict[str, Any] | None = None
) -> str:
    """Return the text of README.md: metadata for the Hub, how to use the model, and all measured numbers.

    Args:
        report: the contents of `linearize.json`. A null becomes "not measured".
        repo_name: the title, and the name in the loading example: the folder's name or the Hub id.
        recipe: the recipe as plain data. Its summary, paper and attention are shown. None: they are not.
        measured: the reports of `eval` and `bench`, and the names of figures (see `card_measured.measured`).
    """
    base = _base_name(report["base_model"])
    # `--method` may be a file: show its name, never its path.
    method = Path(report["method"]).stem if "/" in report["method"] else report["method"]
    linear, softmax = report["layers"]["linear"], report["layers"]["softmax"]
    recipe, measured = recipe or {}, measured or {}
    auto_class = auto_class_of(_pipeline(report))
    decodes = TASKS[auto_class].decodes
    sections = [
        f"---\n{_metadata(report, method, repo_name).to_yaml()}\n---",
        f"# {repo_name}",
        f"{base} with linear attention (`{method}`) in {len(linear)} of {len(linear) + len(softmax)} "
        "attention layers, made with `linearize`. " + _gain(decodes),
        *_method(recipe.get("attention")),
        "## Use",
        "```python\n"
        f"from transformers import {auto_class}, AutoTokenizer\n\n"
        f'path = "{repo_name}"  # this folder, or its id on the Hub\n'
        f"model = {auto_class}.from_pretrained(path, trust_remote_code=True)\n"
        "tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)\n"
        + (GENERATE if decodes else "")
        + "```",
        "The folder contains its own code. Only `transformers` and `torch` are needed."
        + (SENTENCES if auto_class == Embedding.auto_class else ""),
        *([_with_package(repo_name, auto_class == CausalLM.auto_class)] if decodes else []),
        "## Quality",
        *_quality(report),
        *(card_measured.quality(measured["eval"]) if measured.get("eval") else []),
        *(["## Memory", _memory(report["state_bytes"], report["kv_bytes_per_token"])] if decodes else []),
        *_speed(measured.get("bench")),
        *[f"![{name.removesuffix('.png')}]({name})" for name in measured.get("figures", ())],
        "## Self-check",
        "The same tokens are computed in two ways. The largest difference between their logits:",
        _table("check", "difference", SELF_CHECK, report["self_check"], "{:.1e}"),
        "## Layers",
        f"- linear attention: {_names(linear)}\n- softmax attention: {_names(softmax)}",
        "## How it was made",
        _making(report, base, method, recipe),
        *([f"```\n{report['command']}\n```"] if report.get("command") else []),
        "## Limits",
        _limits(report, decodes),
        *_licence(report.get("origin") or {}, base),
    ]
    return "\n\n".join(sections) + "\n"


def _hub_id(base_model: str) -> str | None:
    """Return the Hub id of a base model, without the name of a GGUF file, or None for `demo` and a local one."""
    repo, _ = split_name(base_model)
    try:
        validate_repo_id(repo)
    except HFValidationError:
        return None
    local = repo == "demo" or repo.endswith(SUFFIX) or Path(base_model).exists() or Path(repo).exists()
    return None if local else repo


def _base_name(base_model: str) -> str:
    """Return the base model's name as Markdown."""
    if base_model == "demo":
        return "The demo teacher"
    if hub_id := _hub_id(base_model):
        return f"[{hub_id}](https://huggingface.co/{hub_id})"
    return f"`{Path(base_model).resolve().name}`"


def _metadata(report: dict, method: str, repo_name: str) -> ModelCardData:
    """Return the card's metadata for the Hub: the base model, the tags, and the perplexity of the model after
    training.
    """
    base_model = _hub_id(report["base_model"])
    perplexity = report["perplexity"] or {}
    stages = (perplexity.get(stage) for stage in ("recovered", "transferred", "swapped"))
    saved = next((value for value in stages if value is not None), None)
    results = None
    if saved is not None:
        results = [
            EvalResult(
                task_type=_pipeline(report),
                dataset_type="held-out",
                dataset_name="held-out documents",
                metric_type="perplexity",
                metric_value=round(saved, 4),
            )
        ]
    origin = report.get("origin") or {}
    return ModelCardData(
        base_model=base_model,
        license=origin.get("license"),
        license_name=origin.get("license_name"),
        license_link=origin.get("license_link"),
        language=origin.get("language"),
        base_model_relation="finetune" if base_model else None,
        library_name="transformers",
        pipeline_tag=_pipeline(report),
        tags=["linearize", "linear-attention", method],
        model_name=repo_name,
        eval_results=results,
    )


def _pipeline(report: dict) -> str:
    """Return the Hub's name of the model's task."""
    return report.get("task", CausalLM.pipeline)


def _gain(decodes: bool) -> str:
    """Return the sentence that states the benefit of linear attention.

    Args:
        decodes: True if the model generates text, False for an encoder.
    """
    if decodes:
        return "The memory of these layers does not grow with the context."
    return "Their cost is linear in the context."


def _with_package(repo_name: str, served: bool) -> str:
    """Return how to use the model with this package, which adds commands and speculative decoding.

    Args:
        served: True if `serve` takes it.
    """
    lines = [
        f'With the package `linearize-cli`: `linearize generate {repo_name} "Once upon a time"` continues a text, and '
        f"`linearize verify {repo_name}` checks that all forms of the model agree."
    ]
    if served:
        lines.append(
            f"`linearize serve {repo_name}` answers clients of OpenAI's API. vLLM, SGLang, llama.cpp and Ollama cannot "
            "run this model, because they replace its attention by their own."
        )
    return " ".join(lines)


def _method(attention: dict | None) -> list[str]:
    """Return a paragraph of two sentences about a recipe's attention, or none without a recipe."""
    if not attention:
        return []
    local, far, parts = attention.get("local"), attention.get("far"), []
    if local:
        what = "the last {size} tokens" if local["scope"] == "sliding" else "its group of {size} tokens"
        sinks = f" and the first {attention['sinks']}" if attention["sinks"] else ""
        kind = "softmax" if local["score"] == "softmax" else f"`{local['score']}`"
        parts.append(f"A token attends to {what.format(**local)}{sinks} exactly ({kind} attention).")
    if far:
        older = "All older tokens" if local else "All tokens"
        forgets = (
            ""
            if attention["memory"]["kind"] == "none"
            else f", which forgets (`{attention['memory']['kind']}`)"
        )
        parts.append(
            f"{older} are read through `{far['feature_map']}` features from a state of constant size{forgets}."
        )
    elif local:
        parts.append("Older tokens are not seen.")
    return [" ".join(parts)] if parts else []


def _speed(report: dict | None) -> list[str]:
    """Return the section about a report of `bench`, or nothing without one."""
    rows = card_measured.speed(report) if report else []
    return ["## Speed", *rows] if rows else []


def _limits(report: dict, decodes: bool) -> str:
    """Return the Markdown list of what a user of the model should know."""
    lines = []
    if decodes and report["layers"]["linear"]:
        lines.append(
            "A state of constant size is a summary. A name or a number from further back than the window may be "
            "lost; `linearize eval` measures this."
        )
    if report.get("seq_len"):
        lines.append(f"The quality was recovered on blocks of {report['seq_len']:,} tokens.")
    lines.append("What the base model gets wrong, this one gets wrong too.")
    return "\n".join(f"- {line}" for line in lines)


def _licence(origin: dict, base: str) -> list[str]:
    """Return the section about the base model's licence, or nothing if none is known."""
    if not origin.get("license"):
        return []
    name = origin.get("license_name") or origin["license"]
    link = origin.get("license_link")
    shown = f"[{name}]({link})" if link and link.startswith("http") else f"`{name}`"
    return ["## Licence", f"The licence of the base model {base} is {shown}. It applies to this model too."]


def _quality(report: dict) -> list[str]:
    """Return the tables of perplexities. For a task without labels, return the table of the distance from
    the teacher.
    """
    if found := next((metric for metric in DISTANCES if report.get(metric)), None):
        labels = {name: {**PERPLEXITY, **ABLATION}[name] for name in report[found]}
        return [_table("model", DISTANCES[found], labels, report[found], "{:.4f}")]
    return [
        _table("model", "perplexity", PERPLEXITY, report["perplexity"], "{:,.3f}"),
        "The perplexity of each part of the attention alone:",
        _table("ablation", "perplexity", ABLATION, report["ablation"], "{:,.3f}"),
    ]


def _table(subject: str, measure: str, labels: dict[str, str], values: dict | None, style: str) -> str:
    """Return a Markdown table with one row for each label.

    Args:
        subject, measure: the titles of the two columns.
        labels: the text of the first column, by key.
        values: the numbers by the same keys. A missing one becomes "not measured".
        style: the format of a number.
    """
    rows = [f"| {label} | {_number((values or {}).get(key), style)} |" for key, label in labels.items()]
    return "\n".join([f"| {subject} | {measure} |", "| --- | ---: |", *rows])


def _memory(state_bytes: int | None, kv_bytes_per_token: int | None) -> str:
    """Return a Markdown table: the size of the linear layers' state and of the KV cache that it replaces, and
    the context length at which the state becomes smaller.
    """
    values: dict[str, str | None] = {
        "state": state_bytes and size(state_bytes),
        "kv": kv_bytes_per_token and size(kv_bytes_per_token),
    }
    labels = {
        "state": "state of the linear layers, per sequence",
        "kv": "KV cache that they replace, per token",
    }
    if state_bytes is not None and kv_bytes_per_token:
        values["even"] = f"{int(state_bytes // kv_bytes_per_token) + 1:,}"
    labels["even"] = "context at which the state becomes smaller, tokens"
    return _table("memory for decoding", "size", labels, values, "{}")


def _names(modules: list[str]) -> str:
    """Return module names as Markdown code, separated by commas, or "none" for an empty list."""
    return ", ".join(f"`{module}`" for module in modules) or "none"


def _making(report: dict, base: str, method: str, recipe: dict) -> str:
    """Return the Markdown list of how the model was made: base model, method, paper, tokens, seconds and
    versions.
    """
    paper = re.sub(r"\b\d{4}\.\d{4,5}\b", r"[\g<0>](https://arxiv.org/abs/\g<0>)", recipe.get("paper") or "")
    lines = {
        "base model": base,
        "method": f"`{method}`" + (f": {recipe['summary']}" if recipe.get("summary") else ""),
        "paper": paper,
        "training tokens": _pairs(report["tokens"], "{:,}"),
        "Medusa heads": _medusa(report.get("medusa")),
        "seconds": _pairs(report["seconds"], "{:,.1f}"),
        "versions": _pairs(report["versions"], "{}"),
    }
    return "\n".join(f"- {name}: {text}" for name, text in lines.items() if text)


def _medusa(facts: dict | None) -> str:
    """Return the description of the Medusa heads, or an empty text without heads."""
    if not facts:
        return ""
    return (
        f"{facts['heads']}, in `medusa.safetensors`, with a tree of {facts['tree_nodes']} nodes, "
        f"{_number(facts['expected_tokens_per_step'], '{:.2f}')} expected tokens per step"
    )


def _pairs(values: dict | None, style: str) -> str:
    """Return names and numbers as text, separated by commas, or "not measured" without any."""
    pairs = [f"{name} {_number(value, style)}" for name, value in (values or {}).items()]
    return ", ".join(pairs) or NOT_MEASURED


def _number(value: float | str | None, style: str) -> str:
    """Return a number as text, or "not measured" for None.

    Args:
        style: the format of a number.
    """
    return NOT_MEASURED if value is None else style.format(value)
