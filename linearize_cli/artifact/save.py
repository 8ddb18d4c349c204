"""Writing an artifact: weights, config, code, tokenizer, recipe, report and card."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize_cli.artifact.card import card
from linearize_cli.artifact.checksums import sha256
from linearize_cli.files import write_json, write_text
from linearize_cli.methods.recipe import Recipe


def save_artifact(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
) -> None:
    """Write an artifact without its report and card, which need the reloaded artifact."""
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_text(folder / "recipe.yaml", recipe.dump())
    for weights in folder.glob("*.safetensors"):  # safetensors makes them readable by their owner only
        weights.chmod((folder / "config.json").stat().st_mode)


def save_report(folder: Path, name: str, recipe: Recipe, report: dict[str, Any]) -> None:
    """Write the card (README.md) and `linearize.json`, which holds the card's SHA-256 sum."""
    write_text(folder / "README.md", card(report, repo_name=name, recipe=recipe.to_dict()))
    report["card"] = sha256(folder / "README.md")
    write_json(folder / "linearize.json", report)
