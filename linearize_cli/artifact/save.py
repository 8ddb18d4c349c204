"""Saving of an artifact: weights, config, code, tokenizer, recipe, report and model card."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize_cli.artifact.card import card
from linearize_cli.artifact.card_measured import measured
from linearize_cli.artifact.record import edited, read_record, write_record
from linearize_cli.checksums import sha256
from linearize_cli.errors import UserError
from linearize_cli.files import write_text
from linearize_cli.inputs import read_yaml
from linearize_cli.methods.recipe import Recipe
from linearize_cli.terminal import Terminal


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
    write_record(folder, report)


def refresh_card(folder: Path, terminal: Terminal) -> None:
    """Write the model card again, with what `eval` and `bench` have measured since it was written.

    A card that a user has edited stays as it is, and so does one in the Hub's cache. If a file of the artifact is
    damaged, a note says so: what was measured is not lost for it.
    """
    path, report = folder / "README.md", folder / "linearize.json"
    if not path.is_file() or path.is_symlink() or report.is_symlink():
        return
    try:
        record = read_record(folder)
        if edited(record):
            raise UserError(f"{report} was edited")
        recipe = read_yaml(folder / "recipe.yaml")
        name = folder.resolve().name
        text = card(record, repo_name=name, recipe=recipe, measured=measured(folder)).encode()
        # A killed command may have written the new card, and not yet its sum.
        if record["card"] == sha256(path) or path.read_bytes() == text:
            write_text(path, text.decode())
            write_record(folder, {**record, "card": sha256(path)})
    except (UserError, OSError, LookupError, TypeError, ValueError, AttributeError, StopIteration) as error:
        said = error.what if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        terminal.note(f"the model card was not written again: {said}")
