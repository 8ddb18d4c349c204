"""Text that the teacher samples for its own training (`--data self`), for users without data."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from huggingface_hub import cached_assets_path
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from linearize_cli.files import replacing
from linearize_cli.terminal import Terminal

ROWS = 32  # documents that are sampled in one batch
LIBRARY, NAMESPACE = "linearize", "self"


def write_corpus(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    tokens: int,
    length: int,
    seed: int,
    terminal: Terminal,
) -> None:
    """Sample documents from the model at temperature 1 into a JSONL file.

    Every batch has its own seed. An interrupted file therefore continues with the same text, and a shorter
    corpus is the beginning of a longer one. The finished text is also kept in the cache of huggingface_hub,
    under a hash of the teacher and of the settings. The next conversion of the same teacher reads it from
    there.

    Args:
        path: the JSONL file to write or to continue.
        tokens: the number of tokens at which sampling stops.
        length: the largest length of a document, in tokens.
        seed: the seed of the run.
    """
    cached = corpus_cache(fingerprint(model, tokenizer, length, seed))
    if cached.exists() and not path.exists():
        shutil.copyfile(cached, path)
        terminal.note(f"text sampled by an earlier run is read from {cached}")
    batch = size = total = 0
    for lines in whole_batches(path):
        if total >= tokens:
            break
        batch, size = batch + 1, size + sum(map(len, lines))
        total += sum(json.loads(line)["tokens"] for line in lines)
    with terminal.progress("self", tokens, min(total, tokens)) as advance, path.open("a") as file:
        file.truncate(size)
        while total < tokens:
            with torch.random.fork_rng():
                torch.manual_seed(seed * 1_000_003 + batch)
                written = sample(model, tokenizer, length)
            new = sum(len(ids) for ids in written)
            texts = tokenizer.batch_decode(written, skip_special_tokens=True)
            records = zip(texts, map(len, written), strict=True)
            file.writelines(json.dumps({"text": text, "tokens": n}) + "\n" for text, n in records)
            file.flush()
            advance(min(new, tokens - total))
            batch, total = batch + 1, total + new
    keep(path, cached, terminal)


def whole_batches(path: Path) -> Iterator[list[bytes]]:
    """Yield the lines of an existing corpus file, one batch of documents at a time, without an incomplete
    last batch.
    """
    if not path.exists():
        return
    with path.open("rb") as stream:
        while len(lines := list(islice(stream, ROWS))) == ROWS and lines[-1].endswith(b"\n"):
            yield lines


def keep(path: Path, cached: Path, terminal: Terminal) -> None:
    """Copy a corpus into the cache, unless the cache has one that is at least as long. If writing fails, only
    a note is shown.

    Args:
        path: the corpus.
        cached: its path in the cache.
    """
    if cached.exists() and cached.stat().st_size >= path.stat().st_size:
        return
    try:
        with replacing(cached, f".{os.getpid()}") as temporary:
            shutil.copyfile(path, temporary)
    except OSError as error:
        terminal.note(f"the sampled text could not be cached for later conversions: {error}")


def corpus_cache(key: str) -> Path:
    """Return the path of the cached corpus with the hash `key` (see `fingerprint`). It need not exist."""
    return cached_assets_path(LIBRARY, NAMESPACE, key) / "corpus.jsonl"


def fingerprint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int, seed: int) -> str:
    """Return a hash of everything that determines the sampled text: the weights, the tokenizer and the
    settings.
    """
    digest = hashlib.sha256()
    settings = (type(model).__name__, model.device.type, ROWS, length, seed, end_ids(model, tokenizer))
    config = model.config.to_dict() | {"_name_or_path": None}
    texts = (config, tokenizer.get_vocab(), tokenizer.special_tokens_map, settings)
    digest.update(json.dumps(texts, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end a document: EOS, and BOS, which begins the next document."""
    own = model.generation_config.eos_token_id
    ends = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id, tokenizer.bos_token_id]
    return sorted({token for token in ends if token is not None})


@torch.no_grad()
def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int) -> list[Tensor]:
    """Sample 32 texts from the model at temperature 1.

    Args:
        length: the largest length of a text, in tokens.

    Returns:
        token ids `[T_i]` int64 on the CPU. Each text starts with BOS, or with a random token if the tokenizer
            has no BOS. The token that ends it is not included.
    """
    if tokenizer.bos_token_id is not None:
        start = torch.full((ROWS, 1), tokenizer.bos_token_id)
    else:
        start = torch.randint(0, model.config.get_text_config().vocab_size, (ROWS, 1))
    start, ends = start.to(model.device), end_ids(model, tokenizer)
    plain = GenerationConfig(
        do_sample=True,
        top_k=0,
        min_new_tokens=1,  # so that no document is empty
        max_new_tokens=length - 1,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
        use_cache=True,
    )
    # The model's own settings are replaced: their penalties and top-k would change the distribution.
    own, model.generation_config = model.generation_config, plain
    try:
        output = model.generate(start, attention_mask=torch.ones_like(start)).cpu()
    finally:
        model.generation_config = own
    ended = torch.isin(output, torch.tensor(ends, dtype=output.dtype))
    ended[:, 0] = False
    lengths = torch.where(ended.any(-1), ended.int().argmax(-1), output.shape[1])
    return [row[:n] for row, n in zip(output, lengths.tolist(), strict=True)]
