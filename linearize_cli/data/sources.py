"""Text sources as streams of documents, and documents as blocks of tokens."""

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
from linearize_cli.models.tasks import Task, TokenBeyond

DEMO_SEED, DEMO_DOCUMENTS = 2, 20_000
HELD_OUT_SHARE = 0.01
HELD_OUT_LIMIT = 500_000  # tokens held out at most, so that measuring stays a small part of a long run
HELD_OUT_OF_STREAM = 500  # documents, of a stream whose end is not known
SUFFIXES = tuple(READERS)


@dataclass(frozen=True)
class Source:
    """A named text source.

    Attributes:
        documents: starts a new pass.
        count: the number of documents, if known.
        bad: the rows that cannot be used; sources of one run share it.
        local: whether all of it is at hand, so that it can be read through before the start.
    """

    name: str
    documents: Callable[[], Iterator[Document]]
    count: int | None = None
    bad: BadRows = field(default_factory=BadRows)
    local: bool = False


def open_source(name: str, bad: BadRows | None = None) -> Source:
    """A text file (one document), JSONL or parquet (`text` field, or a chat in `messages`), a folder of them, or a
    Hub dataset `name[:config][:split]`; `demo` is the generated text of the embedded teacher.

    Args:
        bad: the rows of the run that cannot be used; None allows none.

    Raises:
        UserError: nothing is there, the form is unknown, it holds no text, or a row cannot be used.
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
            try:
                yield from READERS[file.suffix](file, bad)
            except OSError as error:
                raise UserError(
                    f"cannot read {file}: {error.strerror or error}", "Check its rights."
                ) from None

    # All of it is decoded and parsed here: a fault at the end must not show after hours of training.
    total = sum(any([True for _ in document]) for document in read())
    if total == 0:
        raise UserError(f"{name} holds no text", "Name data with at least one document that is not empty.")
    return Source(name, read, total, bad, local=True)


def demo_source(bad: BadRows) -> Source:
    from linearize_cli.data.demo_corpus import generate_documents

    def read() -> Iterator[Document]:
        return ([document.text] for document in generate_documents(DEMO_SEED, DEMO_DOCUMENTS))

    return Source(DEMO, read, DEMO_DOCUMENTS, bad)


def hub_source(name: str, bad: BadRows) -> Source:
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

    def read() -> Iterator[Document]:
        where = (f"the dataset {name}, row {number}" for number in count(1))
        return documents(zip(where, stream, strict=False), bad)

    return Source(name, read, bad=bad)


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

    total = None if None in counts else sum(counts)
    names, local = ", ".join(s.name for s in sources), all(s.local for s in sources)
    return Source(names, read, total, sources[0].bad, local)


def hold_out(source: Source) -> tuple[Source, Source]:
    """Split off the last 1% of documents (at least one) for measuring; of a stream whose end is not among its
    first 1,000, the first 500.

    Raises:
        UserError: there is only one.
    """
    total, limit = source.count, 2 * HELD_OUT_OF_STREAM
    if total is None:
        total = sum(1 for _ in islice(source.documents(), limit))
        if total == limit:
            return part(source, HELD_OUT_OF_STREAM, None), part(source, 0, HELD_OUT_OF_STREAM)
    if total < 2:
        raise UserError(
            f"{source.name} holds a single document, so nothing can be held out of it",
            "Pass --eval-data with text to measure on.",
        )
    kept = total - max(1, round(total * HELD_OUT_SHARE))
    return part(source, 0, kept), part(source, kept, total)


def part(source: Source, first: int, end: int | None) -> Source:
    """The documents of a source from `first` on, before `end`."""
    name = source.name if first == 0 else f"{source.name} from document {first + 1} on"
    name += "" if end is None else f", {end - first} documents"
    rest = None if end is None else end - first
    return replace(source, name=name, documents=lambda: islice(source.documents(), first, end), count=rest)


def tokens(source: Source, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Token ids of the joined documents, a piece at a time; each document starts with BOS if there is one."""
    return (piece[0].tolist() for piece in encoded(source, tokenizer))


def encoded(source: Source, tokenizer: PreTrainedTokenizerBase) -> Iterator[Tensor]:
    """Yield the documents as tokens, a piece at a time, as `encode` does, without those that are bad rows."""
    for document in source.documents():
        if getattr(document, "where", None) in source.bad.skipped:
            continue
        try:
            yield from encode(document, tokenizer)
        except BadRow as error:
            source.bad.skip(error)


def read_through(source: Source, tokenizer: PreTrainedTokenizerBase, task: Task) -> None:
    """Find the rows of local text that cannot be used, before a run starts: chats that the template refuses and,
    where the tokenizer has tokens that the model has no embeddings for, text with such tokens. What comes from
    the Hub is checked as it is read.

    Raises:
        BadRow: there are more such rows than may be left out.
    """
    for document in source.documents() if source.local else ():
        where = getattr(document, "where", source.name)
        try:
            if task.beyond:
                for piece in encode(document, tokenizer):
                    task.check_tokens(piece[0])
            elif isinstance(document, Chat):
                check_chat(document, tokenizer)
        except TokenBeyond as error:
            source.bad.skip(BadRow(where, error.what, error.hint))
        except BadRow as error:
            source.bad.skip(error)


def encoded_blocks(source: Source, tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[Tensor]:
    """Consecutive blocks of `length` tokens of the joined documents, `[3, length]` as `encode` has them; the rest
    is dropped.
    """
    pending = torch.empty(3, 0, dtype=torch.long)
    for piece in encoded(source, tokenizer):
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
