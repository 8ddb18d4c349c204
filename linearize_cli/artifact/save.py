"""Saving of an artifact: weights, config, code, tokenizer, recipe, report and model card."""

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
    """Write an artifact's folder without its report and model card, which need measurements on the loaded
    artifact.
    """
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_text(folder / "recipe.yaml", recipe.dump())
    for weights in folder.glob("*.safetensors"):  # safetensors makes them readable by their owner only
        weights.chmod((folder / "config.json").stat().st_mode)


def save_report(folder: Path, name: str, recipe: Recipe, report: dict[str, Any]) -> None:
    """Write the model card (README.md) and `linearize.json`, which records the card's SHA-256 sum.

    Args:
        name: the artifact's name in the card.
        report: the contents of `linearize.json`. The card's sum is added to it.
    """
    write_text(folder / "README.md", card(report, repo_name=name, recipe=recipe.to_dict()))
    report["card"] = sha256(folder / "README.md")
    write_json(folder / "linearize.json", report)
