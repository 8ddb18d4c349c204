"""The parts of `eval.json`: measurements of a student compared with its teacher."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize_cli.data.demo_corpus import HELDOUT_SEED, generate_documents
from linearize_cli.metrics import synthetic
from linearize_cli.metrics.ablation import ABLATIONS, has_both_parts, without
from linearize_cli.metrics.embeddings import rank_correlation
from linearize_cli.metrics.generation import continued, generation, greedy
from linearize_cli.metrics.harness import Harness
from linearize_cli.metrics.perplexity import observations
from linearize_cli.metrics.predictions import predictions
from linearize_cli.metrics.recall import recall
from linearize_cli.models.task import Task
from linearize_cli.models.tasks import CausalLM
from linearize_cli.runtime.dispatch import converted
from linearize_cli.terminal import Terminal

BINS = 16  # bins of positions
BATCH = 8  # blocks in one forward of an embedding model
DOCUMENTS = 100  # documents of the demo for recall
PROMPT, NEW, PROMPTS = 32, 64, 8  # generation: prompt tokens, new tokens, number of prompts
# The prompts of the texts that the report quotes. The user's text is not quoted, because the report may be published.
QUOTED = ("Once upon a time", "The most important thing about water is", "def mean(values):")
NO_WINDOW = 32  # replaces the window size in recall distances if a method has no window


@dataclass(frozen=True)
class Pair:
    """A teacher and its student, and what both are measured with.

    Attributes:
        tokenizer, task: those of both models.
        text: the token ids `[N]` of the text that both are measured on.
        terminal: shows the progress.
        seed: the seed of recall probes and of sampled text.
    """

    teacher: PreTrainedModel
    student: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    text: Tensor
    terminal: Terminal
    seed: int

    @property
    def models(self) -> dict[str, PreTrainedModel]:
        """Return both models by name, the teacher first."""
        return {"teacher": self.teacher, "student": self.student}

    def blocks(self, length: int) -> Tensor:
        """Return the text as consecutive blocks `[N, length]`. Tokens that do not fill the last block are
        dropped.
        """
        return self.text[: len(self.text) // length * length].view(-1, length)


def measure_text(pair: Pair, contexts: list[int]) -> dict[str, Any]:
    """Measure how well a student with logits and its teacher predict a text: the keys `perplexity`, `kl`,
    `top1_agreement` and `ablation`.

    Args:
        contexts: block lengths in tokens. The first is used for the overall numbers.

    Returns:
        These parts of `eval.json`. Perplexities are None if plain text gives no labels for the models' task.
    """
    models, answers, by_context, by_length = list(pair.models.values()), pair.task.answers, [], {}
    for length in contexts:
        blocks = pair.blocks(length)
        with pair.terminal.progress(f"blocks of {length:,}", blocks.numel()) as advance:
            found = by_length[length] = predictions(models, blocks, pair.task, advance)
        by_context.append(
            {
                "context": length,
                "blocks": len(blocks),
                "teacher": found.perplexity(0) if answers else None,
                "student": found.perplexity(1) if answers else None,
                "kl": found.mean(found.kl),
                "top1_agreement": found.mean(found.same),
            }
        )
    first, longest = by_context[0], by_length[max(contexts)]
    width, end = -(-max(contexts) // BINS), len(longest.count)
    positions = [
        {
            "start": start,
            "end": min(start + width, end),
            "teacher": longest.perplexity(0, start, start + width),
            "student": longest.perplexity(1, start, start + width),
        }
        for start in range(0, end, width)
    ]
    return {
        "perplexity": {
            "teacher": first["teacher"],
            "student": first["student"],
            "by_position": positions if answers else None,
            "by_context": by_context,
        },
        "kl": first["kl"],
        "top1_agreement": first["top1_agreement"],
        "ablation": measure_ablation(pair, contexts[0], first["student"]),
        "embeddings": None,
    }


def measure_embeddings(pair: Pair, contexts: list[int]) -> dict[str, Any]:
    """Measure how far the embeddings of blocks of text agree.

    Args:
        contexts: block lengths in tokens.

    Returns:
        The parts of `eval.json` that `measure_text` returns for other models, without numbers, and under
            `embeddings`, for each length, `distance` (1 - cosine of the two models' embeddings of a block)
            and `rank_correlation` (between the two models' similarities of all pairs of blocks).
    """
    rows = []
    for length in contexts:
        blocks, found = pair.blocks(length), {}
        for name, model in pair.models.items():
            with pair.terminal.progress(f"{name}, blocks of {length:,}", blocks.numel()) as advance:
                found[name] = observations(model, blocks, BATCH, advance, pair.task)
        rows.append(
            {
                "context": length,
                "blocks": len(blocks),
                "distance": pair.task.distance(**found),
                "rank_correlation": rank_correlation(**found),
            }
        )
    return {
        "perplexity": {"teacher": None, "student": None, "by_position": None, "by_context": []},
        "kl": None,
        "top1_agreement": None,
        "ablation": {"full": None, **dict.fromkeys(ABLATIONS)},
        "embeddings": rows,
    }


def measure_ablation(pair: Pair, length: int, full: float | None) -> dict[str, float | None]:
    """Measure the student's perplexity without its local part, and without its linear part.

    Args:
        length: the block length in tokens.
        full: the perplexity of the whole student. If it is None, nothing is measured.

    Returns:
        `full`, and the perplexities `local_only` and `linear_only`. They are None if they were not measured.
    """
    results: dict[str, float | None] = {"full": full, **dict.fromkeys(ABLATIONS)}
    if full is None or not has_both_parts(pair.student):
        return results
    blocks = pair.blocks(length)
    for name, part in ABLATIONS.items():
        with (
            pair.terminal.progress(name.replace("_", " "), blocks.numel()) as advance,
            without(pair.student, part),
        ):
            results[name] = predictions([pair.student], blocks, pair.task, advance).perplexity(0)
    return results


def measure_recall(pair: Pair, longest: int, demo: bool) -> dict[str, Any]:
    """Measure how well both models recall earlier tokens, by distance: the keys `recall` and `passkey`.

    The demo's models are measured on the demo's documents, other causal language models on synthetic probes.

    Args:
        longest: the longest row in tokens.
        demo: True for the demo's models.

    Returns:
        These parts of `eval.json`. A part that does not apply to the models is None.
    """
    if not isinstance(pair.task, CausalLM):
        return {"recall": None, "passkey": None}
    if demo:
        return {"recall": demo_recall(pair), "passkey": None}
    distances = synthetic.distances(window(pair.student) or NO_WINDOW, longest)
    bos = pair.tokenizer.bos_token_id
    opening, random = [] if bos is None else [bos], torch.Generator().manual_seed(pair.seed)
    special = torch.tensor(pair.tokenizer.all_special_ids, dtype=torch.long)
    vocabulary = pair.text.unique()
    vocabulary = vocabulary[~torch.isin(vocabulary, special)]
    probes = {
        "recall": [synthetic.pair_probe(vocabulary, opening, d, random) for d in distances],
        "passkey": [
            synthetic.passkey_probe(pair.tokenizer, pair.text, opening, d, random) for d in distances
        ],
    }
    results = {}
    for name, found in probes.items():
        found = [probe for probe in found if probe and probe.rows.shape[1] <= longest]
        with pair.terminal.progress(name, sum(probe.rows.numel() for probe in found)) as advance:
            results[name] = synthetic.by_distance(pair.models, found, advance)
    return results


def window(model: PreTrainedModel) -> int:
    """Return the size of the largest local part (window or group) of a model's layers, or 0 if they have none."""
    return max(layer.linear_attention.equation.size for layer in converted(model).values())


def demo_recall(pair: Pair) -> dict[str, Any]:
    """Measure the recall of both models on the demo's documents.

    Returns:
        `teacher` and `student` (the share of repeated words that each recalls), and under `by_distance` the
        same for each bin of distances, from `distance` to `until - 1` tokens.
    """
    documents = list(generate_documents(HELDOUT_SEED, DOCUMENTS))
    found = {name: recall(model, pair.tokenizer, documents) for name, model in pair.models.items()}
    bins = zip(*(result["by_distance"] for result in found.values()), strict=True)
    return {
        **{name: result["accuracy"] for name, result in found.items()},
        "by_distance": [
            {
                **dict(zip(("distance", "until"), parts[0]["distance"], strict=True)),
                **{name: part["accuracy"] for name, part in zip(found, parts, strict=True)},
            }
            for parts in bins
        ],
    }


def measure_generation(pair: Pair, length: int) -> dict[str, Any]:
    """Compare how the student and its teacher continue a few prompts, which are spread over the text.

    Args:
        length: the largest number of tokens of a prompt and its continuation.
    """
    prompt = min(PROMPT, length // 2)
    rows = pair.blocks(prompt + min(NEW, length - prompt))
    rows = rows[:: max(1, len(rows) // PROMPTS)][:PROMPTS]
    total = 4 * len(rows) * (rows.shape[1] - prompt)
    with pair.terminal.progress("generation", total) as advance:
        measured = generation(pair.task, pair.models, rows, prompt, pair.seed, advance)
    return {**measured, "samples": [sample(pair, text, length) for text in QUOTED]}


def sample(pair: Pair, prompt: str, length: int) -> dict[str, str]:
    """Return a prompt and the greedy continuation of it by each model, as text.

    Args:
        length: the largest number of tokens of the prompt and its continuation.
    """
    row = torch.tensor([pair.task.prompt(pair.tokenizer, prompt)])[:, : length // 2]
    new = min(NEW, length - row.shape[1])
    texts = {
        name: pair.tokenizer.decode(
            continued(pair.task, model, row, new, greedy)[0], skip_special_tokens=True
        )
        for name, model in pair.models.items()
    }
    return {"prompt": prompt, **texts}


def measure_tasks(pair: Pair, harness: Harness) -> dict[str, Any]:
    """Run lm_eval's tasks on both models and return `{task: {metric: {teacher, student}}}`."""
    pair.terminal.note(f"lm_eval: {', '.join(harness.names)}")
    found = {name: harness.run(model, pair.tokenizer, pair.seed) for name, model in pair.models.items()}
    return {
        task: {metric: {name: found[name][task].get(metric) for name in found} for metric in metrics}
        for task, metrics in found["teacher"].items()
    }
