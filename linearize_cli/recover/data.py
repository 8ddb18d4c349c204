"""Text sources as streams of documents, and documents as blocks of tokens."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from linearize_cli.errors import UserError

DEMO, SELF = "demo", "self"
DEMO_SEED, DEMO_DOCUMENTS = 2, 20_000
PIECE = 1 << 20  # characters of a text file read at once
HELD_OUT_SHARE = 0.01
HELD_OUT_LIMIT = 500_000  # tokens held out at most, so that measuring stays a small part of a long run
SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")

# A document as pieces of text, so that a long one is never whole in memory.
Document = Iterable[str]


@dataclass(frozen=True)
class Source:
    """A named text source. `documents()` starts a new pass; `count` is the number of documents, if known."""

    name: str
    documents: Callable[[], Iterator[Document]]
    count: int | None = None


def open_source(name: str) -> Source:
    """A text file (one document), JSONL (`text` field) or parquet, a folder of them, or a Hub dataset
    `name[:config][:split]`; `demo` is the generated text of the embedded teacher.

    Raises:
        UserError: nothing is there, the form is unknown, or it holds no text.
    """
    if not name.strip():
        raise UserError(
            "SRC is empty", "Name a text, JSONL or parquet file, a folder of them, or a Hub dataset."
        )
    if name == DEMO:
        return demo_source()
    path = Path(name).expanduser()
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

    def documents() -> Iterator[Document]:
        for file in files:
            yield from READERS[file.suffix](file)

    try:
        count = sum(1 for document in documents() for _ in islice(document, 1))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} holds a file that is no UTF-8 text: {error}", "Convert it to UTF-8."
        ) from None
    if count == 0:
        raise UserError(f"{name} holds no text", "Name data with at least one document that is not empty.")
    return Source(name, documents, count)


def demo_source() -> Source:
    from linearize_cli.demo.corpus import generate_documents

    def documents() -> Iterator[Document]:
        return ([document.text] for document in generate_documents(DEMO_SEED, DEMO_DOCUMENTS))

    return Source(DEMO, documents, DEMO_DOCUMENTS)


def read_text(file: Path) -> Iterator[Document]:
    def pieces() -> Iterator[str]:
        with file.open(encoding="utf-8") as stream:
            while piece := stream.read(PIECE):
                yield piece + stream.readline()  # end at a line, so that no word is cut

    if file.stat().st_size:
        yield pieces()


def read_jsonl(file: Path) -> Iterator[Document]:
    with file.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{file}, line {number}: not a JSON object with a `text` field",
                    'Each line must read like {"text": "..."}.',
                ) from None
            if not isinstance(text, str):
                raise UserError(f"{file}, line {number}: `text` is no string", "Mend or remove the line.")
            if text:
                yield [text]


def read_parquet(file: Path) -> Iterator[Document]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        if "text" not in table.schema_arrow.names:
            raise UserError(
                f"{file} has no `text` column", f"Its columns: {', '.join(table.schema_arrow.names)}."
            )
        for batch in table.iter_batches(columns=["text"]):
            yield from ([text] for text in batch.column(0).to_pylist() if text)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(
            f"cannot read {file}: {error}", "The file may be cut short; fetch it again."
        ) from None


READERS = {".txt": read_text, ".md": read_text, ".jsonl": read_jsonl, ".parquet": read_parquet}


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
    return Source(name, lambda: ([row["text"]] for row in stream if row.get("text")))


def joined(sources: Iterable[Source]) -> Source:
    """Several sources, one after the other."""
    sources = list(sources)
    counts = [s.count for s in sources]

    def documents() -> Iterator[Document]:
        for source in sources:
            yield from source.documents()

    return Source(", ".join(s.name for s in sources), documents, None if None in counts else sum(counts))


def hold_out(source: Source) -> tuple[Source, Source]:
    """Split off the last 1% of documents (at least one) for measuring.

    Raises:
        UserError: the number of documents is not known, or there is only one.
    """
    if source.count is None:
        raise UserError(
            f"{source.name} is a stream of unknown length, so nothing can be held out of it",
            "Pass --eval-data with text to measure on.",
        )
    if source.count < 2:
        raise UserError(
            f"{source.name} holds a single document, so nothing can be held out of it",
            "Pass --eval-data with text to measure on.",
        )
    held = max(1, round(source.count * HELD_OUT_SHARE))
    kept = source.count - held
    return (
        Source(source.name, lambda: islice(source.documents(), kept), kept),
        Source(
            f"the last {held} documents of {source.name}",
            lambda: islice(source.documents(), kept, None),
            held,
        ),
    )


def tokens(source: Source, tokenizer) -> Iterator[list[int]]:
    """Token ids of the joined documents, a piece at a time; each document starts with BOS if there is one."""
    for document in source.documents():
        if tokenizer.bos_token_id is not None:
            yield [tokenizer.bos_token_id]
        for piece in document:
            yield tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]


def blocks(source: Source, tokenizer, length: int) -> Iterator[Tensor]:
    """Consecutive blocks of `length` tokens of the joined documents, int64 `[length]`; the rest is dropped."""
    pending: list[int] = []
    for ids in tokens(source, tokenizer):
        pending += ids
        whole = len(pending) // length * length
        for first in range(0, whole, length):
            yield torch.tensor(pending[first : first + length])
        del pending[:whole]


def batches(source: Source, tokenizer, length: int, size: int, skip: int = 0) -> Iterator[Tensor]:
    """Batches `[size, length]` without end: the source is read again when it is used up.

    Args:
        skip: batches to leave out at the start, to go on where a run was interrupted.

    Raises:
        UserError: the source does not fill one block.
    """

    def endless() -> Iterator[Tensor]:
        while True:
            empty = True
            for block in blocks(source, tokenizer, length):
                empty = False
                yield block
            if empty:
                raise UserError(
                    f"{source.name} is shorter than one block of {length} tokens",
                    "Pass more data, or a smaller --seq-len.",
                )

    stream = islice(endless(), skip * size, None)
    while True:
        yield torch.stack(list(islice(stream, size)))


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
