"""The fingerprint of an artifact: logits that it computed when it was saved.

A later comparison shows a change that affects every way of computing them equally, such as a wrong constant
or another tokenizer.
"""

import copy
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize_cli.models.positions import reach
from linearize_cli.models.task import Task
from linearize_cli.models.tasks import CausalLM
from linearize_cli.runtime.dispatch import converted

SEED, BEST = 20240608, 8
LONGEST = 5_120  # tokens: 2.5 segments of 2,048
LONGEST_READ = 1_024  # tokens for encoders and encoder-decoders, whose kept softmax attention costs more
TEXT = "The quick brown fox jumps over 13 lazy dogs; naïve façade, 東京, 1.5e-3\n\tend"


def fingerprint(task: Task, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Compute the fingerprint of a model in its own dtype.

    Returns:
        `seed` (from which the token sequences are drawn), `dtype` of the computation, `tokenizer` (the token
            ids of a fixed text) and `sequences`. Each sequence has its `length`, and the 8 best `tokens` at
            its last position with their `logits`.
    """
    sequences = []
    for length in lengths(task, model):
        logits = last_logits(task, model, sequence(model, length))
        best = logits.topk(min(BEST, len(logits)))
        sequences.append({"length": length, "tokens": best.indices.tolist(), "logits": best.values.tolist()})
    return {
        "seed": SEED,
        "dtype": str(model.dtype).removeprefix("torch."),
        "tokenizer": tokenizer(TEXT, add_special_tokens=False, verbose=False)["input_ids"],
        "sequences": sequences,
    }


def differences(
    recorded: dict[str, Any], task: Task, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[float, float, bool]:
    """Compare a model with the fingerprint of its artifact.

    Args:
        recorded: the fingerprint in `linearize.json`.

    Returns:
        the largest difference of a logit, the largest logit, and True if the tokenizer gives the recorded
            ids.

    Raises:
        ValueError: the fingerprint in `linearize.json` is incomplete.
    """
    try:
        worst = largest = 0.0
        for own in recorded["sequences"]:
            logits = last_logits(task, model, sequence(model, own["length"], recorded["seed"]))
            expected = torch.tensor(own["logits"], dtype=torch.float64)
            # Compare by token and by rank. A reordered vocabulary changes only the comparison by token.
            for actual in (logits[own["tokens"]], logits.topk(len(expected)).values):
                gap = (actual.double().cpu() - expected).abs().nan_to_num(nan=torch.inf)
                worst = max(worst, gap.max().item())
            largest = max(largest, expected.abs().max().item())
        same = tokenizer(TEXT, add_special_tokens=False, verbose=False)["input_ids"] == recorded["tokenizer"]
    except (KeyError, IndexError, TypeError, RuntimeError) as error:
        raise ValueError(f"the fingerprint in linearize.json is incomplete: {error!r}") from error
    return worst, largest, same


def lengths(task: Task, model: PreTrainedModel) -> list[int]:
    """Return the lengths of the token sequences in a fingerprint: 32 tokens, one and a half windows, and
    5,120 tokens.

    The last is 1,024 tokens if the model is not a causal language model. Each is at most the number of
    positions of the model.
    """
    size = max(module.linear_attention.equation.recent for module in converted(model).values())
    longest = LONGEST if isinstance(task, CausalLM) else LONGEST_READ
    most = reach(model) or longest
    return [min(length, most) for length in (32, max(size + size // 2, 1), longest)]


def sequence(model: PreTrainedModel, length: int, seed: int = SEED) -> Tensor:
    """Return random token ids `[length]` int64. They depend only on the vocabulary's size, the length and the
    seed.
    """
    generator = torch.Generator().manual_seed(seed + length)
    vocabulary = model.get_input_embeddings().num_embeddings
    return torch.randint(vocabulary, (length,), generator=generator).to(model.device)


@torch.inference_mode()
def last_logits(task: Task, model: PreTrainedModel, row: Tensor) -> Tensor:
    """Return the logits `[vocab]` after the last token of a row, or a classifier's `[labels]`."""
    return task.last_logits(model, row).reshape(-1)


def in_float32(model: PreTrainedModel) -> PreTrainedModel | None:
    """Return an fp32 copy of a half-precision model, or None if memory does not suffice for the copy.

    A model in fp32 or fp64 is returned itself.
    """
    if model.dtype in (torch.float32, torch.float64):
        return model
    if model.device.type == "cuda":
        free = torch.cuda.mem_get_info(model.device)[0]
    else:
        free = psutil.virtual_memory().available
    return copy.deepcopy(model).float() if 6 * model.num_parameters() < free else None
