"""The model card (README.md) of an artifact, from the contents of its `linearize.json`."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from linearize_cli.models.tasks import TASKS, CausalLM

NOT_MEASURED = "not measured"

PERPLEXITY = {
    "teacher": "teacher (softmax attention)",
    "swapped": "swapped, before any training",
    "transferred": "after attention transfer",
    "recovered": "after distillation",
}
ABLATION = {
    "full": "full model",
    "local_only": "local part only",
    "linear_only": "linear part only",
}
SELF_CHECK = {
    "incremental": "one pass against token by token",
    "padded": "padded against unpadded",
    "reload": "saved and loaded again",
}


def card(report: dict, *, repo_name: str, recipe: dict | None = None) -> str:
    """The text of README.md: YAML metadata for the Hub, how to load, and every number that was measured.

    Args:
        report: the contents of `linearize.json`; a null becomes "not measured".
        repo_name: the title and the name to load by: the folder's, or the Hub id it will have.
        recipe: the resolved recipe; `summary` and `paper` are shown.
    """
    base = _base_name(report["base_model"])
    # `--method` also takes a file: show its name, never where it lies.
    method = Path(report["method"]).stem if "/" in report["method"] else report["method"]
    linear, softmax = report["layers"]["linear"], report["layers"]["softmax"]
    recipe = recipe or {}
    auto_class = next(name for name, task in TASKS.items() if task.pipeline == _pipeline(report))
    decodes = TASKS[auto_class].decodes
    sections = [
        f"---\n{_metadata(report, method, repo_name).to_yaml()}\n---",
        f"# {repo_name}",
        f"{base} with linear attention (`{method}`) in {len(linear)} of {len(linear) + len(softmax)} "
        "attention layers, made with `linearize`: " + _gain(decodes),
        "## Load",
        "```python\n"
        f"from transformers import {auto_class}, AutoTokenizer\n\n"
        f'path = "{repo_name}"  # this folder, or its id on the Hub\n'
        f"model = {auto_class}.from_pretrained(path, trust_remote_code=True)\n"
        "tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)\n"
        "```",
        "The folder holds its own code: nothing but `transformers` and `torch` is needed.",
        "## Quality",
        *_quality(report),
        *(["## Memory", _memory(report["state_bytes"], report["kv_bytes_per_token"])] if decodes else []),
        "## Self-check",
        "The largest difference between the logits of two ways to the same result:",
        _table("check", "difference", SELF_CHECK, report["self_check"], "{:.1e}"),
        "## Layers",
        f"- linear attention: {_names(linear)}\n- softmax attention: {_names(softmax)}",
        "## How it was made",
        _making(report, base, method, recipe),
    ]
    return "\n\n".join(sections) + "\n"


def _hub_id(base_model: str) -> str | None:
    """`base_model` if it names a repository of the Hub; None for `demo` and local folders."""
    try:
        validate_repo_id(base_model)
    except HFValidationError:
        return None
    return None if base_model == "demo" or Path(base_model).exists() else base_model


def _base_name(base_model: str) -> str:
    if base_model == "demo":
        return "The demo teacher"
    if hub_id := _hub_id(base_model):
        return f"[{hub_id}](https://huggingface.co/{hub_id})"
    return f"`{Path(base_model).resolve().name}`"


def _metadata(report: dict, method: str, repo_name: str) -> ModelCardData:
    """What the Hub reads: the base model, the tags, and the perplexity of the weights that were saved."""
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
    return ModelCardData(
        base_model=base_model,
        base_model_relation="finetune" if base_model else None,
        library_name="transformers",
        pipeline_tag=_pipeline(report),
        tags=["linearize", "linear-attention", method],
        model_name=repo_name,
        eval_results=results,
    )


def _pipeline(report: dict) -> str:
    return report.get("task", CausalLM.pipeline)


def _gain(decodes: bool) -> str:
    if decodes:
        return "in those, the memory for decoding does not grow with the context."
    return "in those, cost is linear in the context."


def _quality(report: dict) -> list[str]:
    """Perplexities; of a classifier, how far it is from its teacher."""
    if kl := report.get("kl"):
        labels = {name: {**PERPLEXITY, **ABLATION}[name] for name in kl}
        return [_table("model", "KL from the teacher, nats", labels, kl, "{:.4f}")]
    return [
        _table("model", "perplexity", PERPLEXITY, report["perplexity"], "{:,.2f}"),
        "What each part contributes, as the perplexity without the other:",
        _table("ablation", "perplexity", ABLATION, report["ablation"], "{:,.2f}"),
    ]


def _table(subject: str, measure: str, labels: dict[str, str], values: dict | None, style: str) -> str:
    """A Markdown table with a row per key of `labels`; `values` maps the same keys to numbers or None."""
    rows = [f"| {label} | {_number((values or {}).get(key), style)} |" for key, label in labels.items()]
    return "\n".join([f"| {subject} | {measure} |", "| --- | ---: |", *rows])


def _memory(state_bytes: int | None, kv_bytes_per_token: int | None) -> str:
    values = {"state": state_bytes, "kv": kv_bytes_per_token}
    labels = {
        "state": "state of the linear layers, bytes per sequence",
        "kv": "KV cache that it replaces, bytes per token",
    }
    if state_bytes is not None and kv_bytes_per_token:
        values["even"] = state_bytes // kv_bytes_per_token + 1
    labels["even"] = "context from which the state is the smaller, tokens"
    return _table("memory for decoding", "size", labels, values, "{:,}")


def _names(modules: list[str]) -> str:
    return ", ".join(f"`{module}`" for module in modules) or "none"


def _making(report: dict, base: str, method: str, recipe: dict) -> str:
    """A list: base, method, paper, tokens and seconds of each stage, versions."""
    paper = re.sub(r"\b\d{4}\.\d{4,5}\b", r"[\g<0>](https://arxiv.org/abs/\g<0>)", recipe.get("paper") or "")
    lines = {
        "base model": base,
        "method": f"`{method}`" + (f": {recipe['summary']}" if recipe.get("summary") else ""),
        "paper": paper,
        "tokens of training": _pairs(report["tokens"], "{:,}"),
        "Medusa heads": _medusa(report.get("medusa")),
        "seconds": _pairs(report["seconds"], "{:,.1f}"),
        "versions": _pairs(report["versions"], "{}"),
    }
    return "\n".join(f"- {name}: {text}" for name, text in lines.items() if text)


def _medusa(facts: dict | None) -> str:
    if not facts:
        return ""
    return (
        f"{facts['heads']}, in `medusa.safetensors`, with a tree of {facts['tree_nodes']} nodes: "
        f"{_number(facts['expected_tokens_per_step'], '{:.2f}')} expected tokens a step"
    )


def _pairs(values: dict | None, style: str) -> str:
    pairs = [f"{name} {_number(value, style)}" for name, value in (values or {}).items()]
    return ", ".join(pairs) or NOT_MEASURED


def _number(value: float | str | None, style: str) -> str:
    return NOT_MEASURED if value is None else style.format(value)
