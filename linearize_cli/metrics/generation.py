"""What a model writes beside its teacher: how much of it repeats itself, and where it first differs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearize_cli.models.tasks import Task

NGRAM = 4


def greedy(logits: Tensor) -> Tensor:
    return logits.argmax(-1)


def sampling(seed: int) -> Callable[[Tensor], Tensor]:
    """Tokens at temperature 1, with chance of its own that no device changes."""
    generator = torch.Generator().manual_seed(seed)

    def choose(logits: Tensor) -> Tensor:
        return torch.multinomial(logits.float().softmax(-1).cpu(), 1, generator=generator)[:, 0]

    return choose


@torch.inference_mode()
def continued(
    task: Task, model: PreTrainedModel, rows: Tensor, new: int, choose: Callable[[Tensor], Tensor]
) -> Tensor:
    """`[R, new]`: tokens that follow rows `[R, T]`, by `choose` from logits `[R, vocab]`. No token ends a row."""
    decoder, token, _ = task.start(model, list(rows.to(model.device)))
    cache, written = decoder.new_cache(), []
    for _ in range(new):
        token = choose(decoder(token, cache)[:, -1])[:, None].to(model.device)
        written.append(token)
    return torch.cat(written, 1).cpu()


def repetition(rows: Tensor) -> float | None:
    """The share of n-grams of 4 tokens that stood in the same row before; rows `[R, T]`."""
    if rows.shape[1] < NGRAM:
        return None
    ngrams = [[tuple(ngram) for ngram in row] for row in rows.unfold(1, NGRAM, 1).tolist()]
    return 1 - sum(len(set(row)) for row in ngrams) / sum(map(len, ngrams))


def agreed(rows: Tensor, others: Tensor) -> float:
    """Tokens at the start of a row that both have, on average over rows `[R, T]`."""
    return (rows == others).cumprod(1).sum(1).double().mean().item()


def generation(
    task: Task,
    models: dict[str, PreTrainedModel],
    text: Tensor,
    prompt: int,
    seed: int,
    progress: Callable[[int], None],
) -> dict[str, Any]:
    """Greedy and sampled continuations of the first `prompt` tokens of text `[R, T]`, T - prompt tokens each.

    Args:
        models: `teacher` and `student`.

    Returns:
        `repetition: {greedy: {teacher, student}, sampled: {teacher, student}, text}` (`text`: of the text's own
        continuation) and `exact_match: {mean, of}`, tokens at the start of the student's greedy continuation that
        are the teacher's.
    """
    new = text.shape[1] - prompt
    written: dict[str, dict[str, Tensor]] = {"greedy": {}, "sampled": {}}
    for name, model in models.items():
        for way, choose in (("greedy", greedy), ("sampled", sampling(seed))):
            written[way][name] = continued(task, model, text[:, :prompt], new, choose)
            progress(len(text) * new)
    shares = {way: {n: repetition(rows) for n, rows in by_model.items()} for way, by_model in written.items()}
    return {
        "prompts": len(text),
        "prompt_tokens": prompt,
        "new_tokens": new,
        "repetition": {**shares, "text": repetition(text[:, prompt:])},
        "exact_match": {"mean": agreed(*written["greedy"].values()), "of": new},
    }
