"""The parts of `eval.json`: what a student does beside its teacher."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize_cli.data.demo_corpus import HELDOUT_SEED, generate_documents
from linearize_cli.metrics import synthetic
from linearize_cli.metrics.ablation import ABLATIONS, has_both_parts, without
from linearize_cli.metrics.generation import generation
from linearize_cli.metrics.harness import Harness
from linearize_cli.metrics.predictions import predictions
from linearize_cli.metrics.recall import recall
from linearize_cli.models.tasks import CausalLM, Task
from linearize_cli.runtime.dispatch import converted
from linearize_cli.terminal import Terminal

BINS = 16  # of positions
DOCUMENTS = 100  # of the demo's, for recall
PROMPT, NEW, PROMPTS = 32, 64, 8  # of the generation checks
NO_WINDOW = 32  # what distances are multiples of where a method has no window


@dataclass(frozen=True)
class Pair:
    """A teacher and its student, and the text `[N]` that they are measured on."""

    teacher: PreTrainedModel
    student: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    text: Tensor
    terminal: Terminal
    seed: int

    @property
    def models(self) -> dict[str, PreTrainedModel]:
        return {"teacher": self.teacher, "student": self.student}

    def blocks(self, length: int) -> Tensor:
        """Consecutive blocks `[N, length]`; the rest is dropped."""
        return self.text[: len(self.text) // length * length].view(-1, length)


def measure_text(pair: Pair, contexts: list[int]) -> dict[str, Any]:
    """`perplexity`, `kl`, `top1_agreement` and `ablation`; perplexities are None where text has no answers."""
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
    }


def measure_ablation(pair: Pair, length: int, full: float | None) -> dict[str, float | None]:
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
    """`recall` and `passkey`: of the demo, of its documents alone; of other models, in rows made for it."""
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
    """The longest near part of its layers, 0 where they have none."""
    return max(layer.linear_attention.equation.size for layer in converted(model).values())


def demo_recall(pair: Pair) -> dict[str, Any]:
    """As `recall`, by the name of the model; a distance stands for those from it up to `until`."""
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
    """Continuations of a few places of the text, far apart."""
    prompt = min(PROMPT, length // 2)
    rows = pair.blocks(prompt + min(NEW, length - prompt))
    rows = rows[:: max(1, len(rows) // PROMPTS)][:PROMPTS]
    total = 4 * len(rows) * (rows.shape[1] - prompt)
    with pair.terminal.progress("generation", total) as advance:
        return generation(pair.task, pair.models, rows, prompt, pair.seed, advance)


def measure_tasks(pair: Pair, harness: Harness) -> dict[str, Any]:
    """`{task: {metric: {teacher, student}}}`."""
    pair.terminal.note(f"lm_eval: {', '.join(harness.names)}")
    found = {name: harness.run(model, pair.tokenizer, pair.seed) for name, model in pair.models.items()}
    return {
        task: {metric: {name: found[name][task].get(metric) for name in found} for metric in metrics}
        for task, metrics in found["teacher"].items()
    }
