"""`--data self`: the teacher writes its own corpus, for users without data."""

import json
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize_cli.console import Terminal

ROWS = 32  # documents sampled at once


@torch.no_grad()
def write_corpus(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    tokens: int,
    length: int,
    seed: int,
    terminal: Terminal,
) -> None:
    """Sample documents of up to `length` tokens at temperature 1 into a JSONL file, until `tokens` are in it.

    Every batch has a seed of its own, so that an interrupted file is continued as if it had not been.
    """
    batches = -(-tokens // (ROWS * length))
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    done = len(lines) // ROWS
    path.write_text("".join(lines[: done * ROWS]))
    with (
        terminal.progress("self", batches * ROWS * length, done * ROWS * length) as advance,
        path.open("a") as file,
    ):
        for batch in range(done, batches):
            with torch.random.fork_rng():
                torch.manual_seed(seed * 1_000_003 + batch)
                texts = sample(model, tokenizer, length)
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
            file.flush()
            advance(ROWS * length)


def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int) -> list[str]:
    """ROWS texts, each from BOS, or from a random token where there is none."""
    if tokenizer.bos_token_id is not None:
        start = torch.full((ROWS, 1), tokenizer.bos_token_id)
    else:
        start = torch.randint(0, model.config.get_text_config().vocab_size, (ROWS, 1))
    start = start.to(model.device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    output = model.generate(
        start,
        attention_mask=torch.ones_like(start),
        max_new_tokens=length - 1,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        pad_token_id=pad,
    )
    return tokenizer.batch_decode(output, skip_special_tokens=True)
