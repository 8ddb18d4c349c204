"""Text sources as streams of documents, and documents as blocks of tokens."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from linearize_cli.batch import Blocks
from linearize_cli.errors import UserError
from linearize_cli.inputs import user_path
from linearize_cli.recipe import Recover
from linearize_cli.recover.encode import encode
from linearize_cli.recover.read import READERS, Document, documents

DEMO, SELF = "demo", "self"
DEMO_SEED, DEMO_DOCUMENTS = 2, 20_000
HELD_OUT_SHARE = 0.01
HELD_OUT_LIMIT = 500_000  # tokens held out at most, so that measuring stays a small part of a long run
HELD_OUT_OF_STREAM = 500  # documents, of a stream whose end is not known
SUFFIXES = tuple(READERS)


@dataclass(frozen=True)
class Source:
    """A named text source. `documents()` starts a new pass; `count` is the number of documents, if known."""

    name: str
    documents: Callable[[], Iterator[Document]]
    count: int | None = None


def open_source(name: str) -> Source:
    """A text file (one document), JSONL or parquet (`text` field, or a chat in `messages`), a folder of them, or a
    Hub dataset `name[:config][:split]`; `demo` is the generated text of the embedded teacher.

    Raises:
        UserError: nothing is there, the form is unknown, or it holds no text.
    """
    if not name.strip():
        raise UserError(
            "SRC is empty", "Name a text, JSONL or parquet file, a folder of them, or a Hub dataset."
        )
    if name == DEMO:
        return demo_source()
    path = user_path(name)
    if path.exists():
        return local_source(name, path)
    if name.startswith((".", "/", "~")) or name.endswith(SUFFIXES):
        raise UserError(
            f"no such data: {name}", "Name a text, JSONL or parquet file, a folder of them, or a Hub dataset."
        )
    return hub_source(name)


def local_source(name: str, path: Path) -> Source:
    files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES) if path.is_dir() else [path]
    if not files:
        raise UserError(f"the folder {name} holds no {', '.join(SUFFIXES)} file", "Name one that does.")
    for file in files:
        if file.suffix not in SUFFIXES:
            raise UserError(
                f"cannot read {file}: its ending is none of {', '.join(SUFFIXES)}", "Rename or convert it."
            )

    def read() -> Iterator[Document]:
        for file in files:
            yield from READERS[file.suffix](file)

    try:
        count = sum(1 for document in read() for _ in islice(document, 1))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} holds a file that is no UTF-8 text: {error}", "Convert it to UTF-8."
        ) from None
    if count == 0:
        raise UserError(f"{name} holds no text", "Name data with at least one document that is not empty.")
    return Source(name, read, count)


def demo_source() -> Source:
    from linearize_cli.demo.corpus import generate_documents

    def read() -> Iterator[Document]:
        return ([document.text] for document in generate_documents(DEMO_SEED, DEMO_DOCUMENTS))

    return Source(DEMO, read, DEMO_DOCUMENTS)


def hub_source(name: str) -> Source:
    """A streamed Hub dataset `name[:config][:split]`, split `train` unless named."""
    import datasets

    repo, *rest = name.split(":")
    config, split = (rest + ["", ""])[:2]
    datasets.disable_progress_bars()
    try:
        stream = datasets.load_dataset(repo, config or None, split=split or "train", streaming=True)
    except Exception as error:  # the library raises many kinds for one cause: it cannot be had
        raise UserError(
            f"cannot open the dataset {name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            "Check the name and the network, or pass --data FILE with text of your own, or --data self.",
        ) from None
    return Source(name, lambda: documents(stream, f"the dataset {name}"))


def joined(sources: Iterable[Source]) -> Source:
    """Several sources in one: a document of each in turn, until all are used up."""
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

    return Source(", ".join(s.name for s in sources), read, None if None in counts else sum(counts))


def hold_out(source: Source) -> tuple[Source, Source]:
    """Split off the last 1% of documents (at least one) for measuring; of a stream whose end is not among its
    first 1,000, the first 500.

    Raises:
        UserError: there is only one.
    """
    count, limit = source.count, 2 * HELD_OUT_OF_STREAM
    if count is None:
        count = sum(1 for _ in islice(source.documents(), limit))
        if count == limit:
            return part(source, HELD_OUT_OF_STREAM, None), part(source, 0, HELD_OUT_OF_STREAM)
    if count < 2:
        raise UserError(
            f"{source.name} holds a single document, so nothing can be held out of it",
            "Pass --eval-data with text to measure on.",
        )
    kept = count - max(1, round(count * HELD_OUT_SHARE))
    return part(source, 0, kept), part(source, kept, count)


def part(source: Source, first: int, end: int | None) -> Source:
    """The documents of a source from `first` on, before `end`."""
    name = source.name if first == 0 else f"{source.name} from document {first + 1} on"
    name += "" if end is None else f", {end - first} documents"
    return Source(name, lambda: islice(source.documents(), first, end), None if end is None else end - first)


def tokens(source: Source, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Token ids of the joined documents, a piece at a time; each document starts with BOS if there is one."""
    return (piece[0].tolist() for document in source.documents() for piece in encode(document, tokenizer))


def encoded_blocks(source: Source, tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[Tensor]:
    """Consecutive blocks of `length` tokens of the joined documents, `[3, length]` as `encode` has them; the rest
    is dropped.
    """
    pending = torch.empty(3, 0, dtype=torch.long)
    for document in source.documents():
        for piece in encode(document, tokenizer):
            pending = torch.cat([pending, piece], 1)
            whole = pending.shape[1] // length * length
            for first in range(0, whole, length):
                yield pending[:, first : first + length]
            pending = pending[:, whole:]


def blocks(source: Source, tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[Tensor]:
    """Consecutive blocks of `length` tokens of the joined documents, int64 `[length]`; the rest is dropped."""
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
    """Batches of `size` blocks of `length` tokens without end: the source is read again when it is used up.

    Args:
        skip: batches to leave out at the start, to go on where a run was interrupted; they are read again.
        separate: mark where documents begin.
        assistant_only: mark what counts, where the chat template tells; blocks without any are left out.

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
    """`batches`, marked as a recipe wants them."""
    marks = {"separate": recover.separate_documents, "assistant_only": recover.assistant_only}
    return batches(source, tokenizer, length, size, skip, **marks)


def evaluation_blocks(source: Source, tokenizer, length: int, limit: int | None = None) -> Tensor:
    """All blocks of an evaluation text, `[N, length]`, at most `limit` tokens.

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
