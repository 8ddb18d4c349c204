"""A multiple-choice task for lm_eval, made from a text file without a download.

    python examples/multiple_choice.py TEXT --out next-passage
    linearize eval ARTIFACT --tasks next-passage/next-passage.yaml

Each question is a passage of the text. The model chooses its continuation among four: the words that follow in the
text, and words that follow three other passages. Chance is 25%.
"""

import json
import random
from pathlib import Path

import click
import yaml

CHOICES = 4
NAME = "next-passage"


@click.command()
@click.argument("text", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the task.")
@click.option(
    "--questions",
    type=click.IntRange(1),
    default=200,
    show_default=True,
    help="Number of questions, at most.",
)
@click.option("--passage", type=click.IntRange(1), default=200, show_default=True, help="Words of a passage.")
@click.option(
    "--continuation", type=click.IntRange(1), default=12, show_default=True, help="Words of a continuation."
)
@click.option("--seed", default=0, show_default=True)
def main(text: Path, out: Path, questions: int, passage: int, continuation: int, seed: int) -> None:
    """Write a task of QUESTIONS from TEXT: a JSONL file and the YAML file that lm_eval reads."""
    words = text.read_text(encoding="utf-8").split()
    least = CHOICES * (passage + continuation)
    if len(words) < least:
        raise click.ClickException(f"{text} is too short: {least:,} words are needed at least")
    rows = sample_questions(words, questions, passage, continuation, seed)
    out.mkdir(parents=True, exist_ok=True)
    data = out.resolve() / f"{NAME}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (out / f"{NAME}.yaml").write_text(yaml.safe_dump(task(data), sort_keys=False), encoding="utf-8")
    click.echo(f"{len(rows)} questions: linearize eval ARTIFACT --tasks {out / NAME}.yaml")


def sample_questions(
    words: list[str], questions: int, passage: int, continuation: int, seed: int
) -> list[dict]:
    """Sample questions from passages of a text that do not overlap.

    Each has the `passage`, the `choices` (each begins with a space), and the index `label` of the true one.
    """
    draw, each = random.Random(seed), passage + continuation
    starts = list(range(0, len(words) - each + 1, each))
    draw.shuffle(starts)
    ends = {start: " " + " ".join(words[start + passage : start + each]) for start in starts}
    rows = []
    for start in starts[:questions]:
        others = draw.sample([other for other in starts if other != start], CHOICES - 1)
        choices = [ends[place] for place in draw.sample([start, *others], CHOICES)]
        label = choices.index(ends[start])
        rows.append({"passage": " ".join(words[start : start + passage]), "choices": choices, "label": label})
    return rows


def task(data: Path) -> dict:
    """Return the definition of the task in lm_eval's format, for the questions in a JSONL file."""
    return {
        "task": NAME,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{passage}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


if __name__ == "__main__":
    main()
