"""Generated text of a student and its teacher: the share of repeated n-grams, and where the texts first differ."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearize_cli.models.task import Task

NGRAM = 4


def greedy(logits: Tensor) -> Tensor:
    """Return the most probable tokens `[R]` of logits `[R, vocab]`."""
    return logits.argmax(-1)


def sampling(seed: int) -> Callable[[Tensor], Tensor]:
    """Return a function that samples at temperature 1, with a CPU generator so that all devices sample the same."""
    generator = torch.Generator().manual_seed(seed)

    def choose(logits: Tensor) -> Tensor:
        return torch.multinomial(logits.float().softmax(-1).cpu(), 1, generator=generator)[:, 0]

    return choose


@torch.inference_mode()
def continued(
    task: Task, model: PreTrainedModel, rows: Tensor, new: int, choose: Callable[[Tensor], Tensor]
) -> Tensor:
    """Continue rows `[R, T]` with `new` tokens each. An end-of-text token does not end a row.

    Args:
        choose: a function from logits `[R, vocab]` to the next tokens `[R]`.

    Returns:
        The new tokens `[R, new]`, on the CPU.
    """
    decoder, token, _ = task.start(model, list(rows.to(model.device)))
    cache, written = decoder.new_cache(), []
    for _ in range(new):
        token = choose(decoder(token, cache)[:, -1])[:, None].to(model.device)
        written.append(token)
    return torch.cat(written, 1).cpu()


def repetition(rows: Tensor) -> float | None:
    """Return the share of 4-grams that occur earlier in the same row of `[R, T]`, or None if rows are too short."""
    if rows.shape[1] < NGRAM:
        return None
    ngrams = [[tuple(ngram) for ngram in row] for row in rows.unfold(1, NGRAM, 1).tolist()]
    return 1 - sum(len(set(row)) for row in ngrams) / sum(map(len, ngrams))


def agreed(rows: Tensor, others: Tensor) -> float:
    """Return the mean number of leading tokens on which two sets of rows `[R, T]` agree."""
    return (rows == others).cumprod(1).sum(1).double().mean().item()


def generation(
    task: Task,
    models: dict[str, PreTrainedModel],
    text: Tensor,
    prompt: int,
    seed: int,
    progress: Callable[[int], None],
) -> dict[str, Any]:
    """Compare greedy and sampled continuations of both models.

    Args:
        models: `teacher` and `student`.
        text: token ids `[R, T]`. The first `prompt` tokens are the prompt, and T - prompt new tokens are
            generated.
        seed: the seed of sampling, the same for both models.
        progress: called with the number of tokens just generated.

    Returns:
        The number of `prompts`, their `prompt_tokens` and `new_tokens`, and:
            repetition: the share of repeated 4-grams: under `greedy` and `sampled` for each model, and under
                `text` for the text's own continuation.
            exact_match: `mean` is the mean number of leading tokens on which the two greedy continuations
                agree. `of` is the largest possible number, T - prompt.
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
