"""Text sources: streams of documents, and blocks of tokens made from them."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count, islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from linearize_cli.data.names import DEMO
from linearize_cli.data.readers import READERS, BadRow, BadRows, Chat, Document, documents
from linearize_cli.data.tokenize import check_chat, encode
from linearize_cli.errors import UserError
from linearize_cli.inputs import user_path
from linearize_cli.methods.recipe import Recover
from linearize_cli.models.batch import Blocks
from linearize_cli.models.task import MissingEmbedding, Task

DEMO_SEED, DEMO_DOCUMENTS = 2, 20_000
HELD_OUT_SHARE = 0.01
HELD_OUT_LIMIT = 500_000  # largest number of held-out tokens, so that evaluation stays short in a long run
HELD_OUT_OF_STREAM = 500  # documents held out of a stream of unknown length
SUFFIXES = tuple(READERS)


@dataclass(frozen=True)
class Source:
    """A named text source.

    Attributes:
        name: its name in messages.
        documents: a function that starts a new pass over the documents.
        count: the number of documents. None if it is not known.
        bad: counts the rows of the run that were skipped. All sources of a run share it.
        local: True if the data is on this machine, so that it can be checked before training.
        first, end: the blocks of tokens to use, from `first` to `end` (exclusive). None: to the last one.
    """

    name: str
    documents: Callable[[], Iterator[Document]]
    count: int | None = None
    bad: BadRows = field(default_factory=BadRows)
    local: bool = False
    first: int = 0
    end: int | None = None


def open_source(name: str, bad: BadRows | None = None) -> Source:
    """Open a text source.

    Args:
        name: a text file (one document), a JSONL or parquet file (`text` or `messages` fields), a folder of
            such files, a Hub dataset `name[:config][:split]`, or `demo` (the generated text of the embedded
            teacher).
        bad: counts the skipped rows of the run. None: no row may be skipped.

    Raises:
        UserError: the source does not exist, has an unknown format, holds no text, or has too many bad rows.
    """
    bad = bad or BadRows()
    if not name.strip():
        raise UserError(
            "SRC is empty", "Name a text, JSONL or parquet file, a folder of them, or a Hub dataset."
        )
    if name == DEMO:
        return demo_source(bad)
    path = user_path(name)
    if path.exists():
        return local_source(name, path, bad)
    if name.startswith((".", "/", "~")) or name.endswith(SUFFIXES):
        raise UserError(
            f"no such data: {name}", "Name a text, JSONL or parquet file, a folder of them, or a Hub dataset."
        )
    return hub_source(name, bad)


def local_source(name: str, path: Path, bad: BadRows) -> Source:
    """Open a file or a folder, and read all of it once to find errors and to count the documents.

    Args:
        name: its name in messages.
        bad: counts the skipped rows of the run.

    Raises:
        UserError: a file cannot be read, or there is no text.
    """
    files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES) if path.is_dir() else [path]
    if not files:
        raise UserError(
            f"the folder {name} holds no {', '.join(SUFFIXES)} file", "Choose a folder that holds one."
        )
    for file in files:
        if file.suffix not in SUFFIXES:
            raise UserError(
                f"cannot read {file}: its suffix is not one of {', '.join(SUFFIXES)}", "Rename or convert it."
            )

    def read() -> Iterator[Document]:
        for file in files:
            try:
                yield from READERS[file.suffix](file, bad)
            except OSError as error:
                raise UserError(
                    f"cannot read {file}: {error.strerror or error}", "Check its permissions."
                ) from None

    # Everything is parsed here, so that an error near the end is not found after hours of training.
    total = sum(any([True for _ in document]) for document in read())
    if total == 0:
        raise UserError(f"{name} holds no text", "Choose data with at least one document that is not empty.")
    return Source(name, read, total, bad, local=True)


def demo_source(bad: BadRows) -> Source:
    """Open the generated text of the embedded teacher."""
    from linearize_cli.data.demo_corpus import generate_documents

    def read() -> Iterator[Document]:
        return ([document.text] for document in generate_documents(DEMO_SEED, DEMO_DOCUMENTS))

    return Source(DEMO, read, DEMO_DOCUMENTS, bad)


def hub_source(name: str, bad: BadRows) -> Source:
    """Open a Hub dataset as a stream.

    Args:
        name: `name[:config][:split]`. The split is `train` by default.
        bad: counts the skipped rows of the run.

    Raises:
        UserError: the dataset cannot be opened.
    """
    import datasets

    repo, *rest = name.split(":")
    config, split = (rest + ["", ""])[:2]
    datasets.disable_progress_bars()
    try:
        stream = datasets.load_dataset(repo, config or None, split=split or "train", streaming=True)
    except Exception as error:  # the library raises many exception types for one cause
        raise UserError(
            f"cannot open the dataset {name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            "Check the name and the network. Or pass --data FILE with your own text, or --data self.",
        ) from None

    def read() -> Iterator[Document]:
        where = (f"the dataset {name}, row {number}" for number in count(1))
        return documents(zip(where, stream, strict=False), bad)

    return Source(name, read, bad=bad)


def joined(sources: Iterable[Source]) -> Source:
    """Join sources into one that interleaves their documents one by one until all are exhausted."""
    sources = list(sources)
    counts = [s.count for s in sources]

    def read() -> Iterator[Document]:
        streams = [source.documents() for source in sources]
        while streams:
            for stream in list(streams):
                if (document := next(stream, None)) is None:
                    streams.remove(stream)
                else:
                    yield document

    total = None if None in counts else sum(counts)
    names, local = ", ".join(s.name for s in sources), all(s.local for s in sources)
    return Source(names, read, total, sources[0].bad, local)


def hold_out(source: Source) -> tuple[Source, Source | None]:
    """Split a source into training text and evaluation text.

    The last 1% of the documents (at least one) is held out. If the number of documents is unknown and at
    least 1,000, the first 500 are held out.

    Returns:
        the training source and the evaluation source. The latter is None if the source has a single document,
            which `hold_out_blocks` divides.
    """
    total, limit = source.count, 2 * HELD_OUT_OF_STREAM
    if total is None:
        total = sum(1 for _ in islice(source.documents(), limit))
        if total == limit:
            return part(source, HELD_OUT_OF_STREAM, None), part(source, 0, HELD_OUT_OF_STREAM)
    if total < 2:
        return source, None
    kept = total - max(1, round(total * HELD_OUT_SHARE))
    return part(source, 0, kept), part(source, kept, total)


def hold_out_blocks(source: Source, tokenizer: PreTrainedTokenizerBase, length: int) -> tuple[Source, Source]:
    """Split a single document into training text and evaluation text: its last 1% of blocks of `length` tokens,
    at least two, are held out.

    Returns:
        the training source and the evaluation source.

    Raises:
        UserError: the document has fewer than three blocks.
    """
    total = sum(piece.shape[1] for piece in encoded(source, tokenizer)) // length
    held_out = max(2, math.ceil(total * HELD_OUT_SHARE))
    if total <= held_out:
        raise UserError(
            f"{source.name} holds {total} blocks of {length} tokens, and 3 are needed: 1 to train on, 2 to measure on",
            "Pass a longer text, --eval-data with text to measure on, or a smaller --seq-len.",
        )
    name = f"the last {held_out} blocks of {source.name}"
    return replace(source, end=total - held_out), replace(source, name=name, first=total - held_out)


def part(source: Source, first: int, end: int | None) -> Source:
    """Return a source of the documents `first` to `end` (exclusive) of a source. If `end` is None, it has all
    from `first` on.
    """
    name = source.name if first == 0 else f"{source.name} from document {first + 1} on"
    name += "" if end is None else f", {end - first} documents"
    rest = None if end is None else end - first
    return replace(source, name=name, documents=lambda: islice(source.documents(), first, end), count=rest)


def tokens(source: Source, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Yield the token ids of the documents, a part of a document at a time. Each document starts with BOS, if
    there is one.
    """
    return (piece[0].tolist() for piece in encoded(source, tokenizer))


def encoded(source: Source, tokenizer: PreTrainedTokenizerBase) -> Iterator[Tensor]:
    """Yield the documents as tensors `[3, n]`, without the bad rows. A document may come in several parts.

    The rows are token ids, 1 at training targets, and 1 at a document's first token (see `encode`).

    Raises:
        BadRow: more rows are bad than may be skipped.
    """
    for document in source.documents():
        if getattr(document, "where", None) in source.bad.skipped:
            continue
        try:
            yield from encode(document, tokenizer)
        except BadRow as error:
            source.bad.skip(error)


def read_through(source: Source, tokenizer: PreTrainedTokenizerBase, task: Task) -> None:
    """Check the documents of a local source before a run starts, and skip its bad rows.

    A row is bad if the chat template refuses it, or if it has a token without an embedding in the model. A
    source on the Hub is not read here, but checked during training.

    Raises:
        BadRow: more rows are bad than may be skipped.
    """
    for document in source.documents() if source.local else ():
        where = getattr(document, "where", source.name)
        try:
            if task.without_embedding:
                for piece in encode(document, tokenizer):
                    task.check_tokens(piece[0])
            elif isinstance(document, Chat):
                check_chat(document, tokenizer)
        except MissingEmbedding as error:
            source.bad.skip(BadRow(where, error.what, error.hint))
        except BadRow as error:
            source.bad.skip(error)


def encoded_blocks(source: Source, tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[Tensor]:
    """Return consecutive blocks of the joined documents, without the incomplete last one.

    Returns:
        blocks `[3, length]`: token ids, 1 at training targets, and 1 at a document's first token.
    """

    def every() -> Iterator[Tensor]:
        pending = torch.empty(3, 0, dtype=torch.long)
        for piece in encoded(source, tokenizer):
            pending = torch.cat([pending, piece], 1)
            whole = pending.shape[1] // length * length
            for first in range(0, whole, length):
                yield pending[:, first : first + length]
            pending = pending[:, whole:]

    return islice(every(), source.first, source.end)


def blocks(source: Source, tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[Tensor]:
    """Yield consecutive blocks `[length]` int64 of the joined documents, without the incomplete last one."""
    return (block[0] for block in encoded_blocks(source, tokenizer, length))


def batches(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    size: int,
    skip: int = 0,
    separate: bool = False,
    assistant_only: bool = False,
) -> Iterator[Blocks]:
    """Yield batches of `size` blocks of `length` tokens without end. An exhausted source is read again.

    Args:
        skip: the number of batches to skip at the start. A resumed run continues there.
        separate: set `Blocks.starts`, so that attention stays within each document. Else it is None.
        assistant_only: set `Blocks.counted`, so that only the assistant's tokens are trained on. Blocks
            without one are skipped. Else it is None.

    Raises:
        UserError: the source does not fill one block.
    """

    def endless() -> Iterator[Tensor]:
        while True:
            empty = True
            for block in encoded_blocks(source, tokenizer, length):
                if not assistant_only or bool(block[1, 1:].any()):
                    empty = False
                    yield block
            if empty:
                raise UserError(
                    f"{source.name} is shorter than one block of {length} tokens",
                    "Pass more data, or a smaller --seq-len.",
                )

    stream = islice(endless(), skip * size, None)
    while True:
        ids, counted, starts = torch.stack(list(islice(stream, size)), 1)
        yield Blocks(ids, starts.bool() if separate else None, counted.bool() if assistant_only else None)


def stream(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    size: int,
    recover: Recover,
    skip: int = 0,
) -> Iterator[Blocks]:
    """Yield batches of `size` blocks of `length` tokens without end, after the first `skip` batches.

    The recipe decides whether documents are kept separate and whether only the assistant's tokens are trained
    on.
    """
    marks = {"separate": recover.separate_documents, "assistant_only": recover.assistant_only}
    return batches(source, tokenizer, length, size, skip, **marks)


def evaluation_blocks(source: Source, tokenizer, length: int, limit: int | None = None) -> Tensor:
    """Return all blocks of an evaluation text, `[N, length]` int64.

    Args:
        limit: the largest number of tokens. None means no limit.

    Raises:
        UserError: the text does not fill one block.
    """
    found = list(
        islice(blocks(source, tokenizer, length), None if limit is None else max(1, limit // length))
    )
    if not found:
        raise UserError(
            f"the evaluation text ({source.name}) is shorter than one block of {length} tokens",
            "Pass a longer --eval-data, or a smaller --seq-len.",
        )
    return torch.stack(found)
