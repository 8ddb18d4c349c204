"""Rows of files and datasets as documents."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from linearize_cli.errors import UserError

PIECE = 1 << 20  # characters of a text file read at once
TEXT, CHATS = "text", ("messages", "conversations")
SPEAKERS = {"human": "user", "gpt": "assistant"}  # as ShareGPT's files call them


class Chat(list[dict[str, Any]]):
    """A document that is a list of messages, as a chat template takes them."""


# A document as pieces of text, so that a long one is never whole in memory.
Document = Iterable[str] | Chat


def document(row: Any, where: str) -> Document | None:
    """What a row holds: its text, or where it has none its chat; None: it is empty.

    Raises:
        UserError: it has no field for either, or something else in it.
    """
    if not isinstance(row, dict) or not {TEXT, *CHATS} & row.keys():
        raise UserError(
            f"{where}: no row with a `text` or a `messages` field",
            'A row must read like {"text": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]}.',
        )
    if text := row.get(TEXT):
        if not isinstance(text, str):
            raise UserError(f"{where}: `text` is no string", "Mend or remove the row.")
        return [text]
    messages = next(filter(None, map(row.get, CHATS)), None)
    if not messages:
        return None
    if not isinstance(messages, list) or not all(map(is_message, messages)):
        raise UserError(
            f"{where}: its messages are no list of objects with `role` and `content`",
            "Mend or remove the row.",
        )
    return Chat(map(message, messages))


def is_message(entry: Any) -> bool:
    return isinstance(entry, dict) and ("role" in entry or {"from", "value"} <= entry.keys())


def message(entry: dict[str, Any]) -> dict[str, Any]:
    """A message as chat templates take it, of one in ShareGPT's form too."""
    if "role" in entry:
        return entry
    return {"role": SPEAKERS.get(entry["from"], entry["from"]), "content": entry["value"]}


def documents(rows: Iterable[Any], where: str) -> Iterator[Document]:
    """The documents of rows that are not empty."""
    return (found for row in rows if (found := document(row, where)) is not None)


def read_text(file: Path) -> Iterator[Document]:
    def pieces() -> Iterator[str]:
        with file.open(encoding="utf-8") as stream:
            try:
                while piece := stream.read(PIECE):
                    yield piece + stream.readline()  # end at a line, so that no word is cut
            except UnicodeDecodeError as error:  # perhaps long after the start
                raise UserError(f"{file} is no UTF-8 text: {error}", "Convert it to UTF-8.") from None

    if file.stat().st_size:
        yield pieces()


def read_jsonl(file: Path) -> Iterator[Document]:
    with file.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            yield from documents([row], f"{file}, line {number}")


def read_parquet(file: Path) -> Iterator[Document]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        names = table.schema_arrow.names
        columns = [name for name in (TEXT, *CHATS) if name in names]
        if not columns:
            raise UserError(f"{file} has no `text` or `messages` column", f"Its columns: {', '.join(names)}.")
        for batch in table.iter_batches(columns=columns):
            yield from documents(batch.to_pylist(), str(file))
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(
            f"cannot read {file}: {error}", "The file may be cut short; fetch it again."
        ) from None


READERS = {".txt": read_text, ".md": read_text, ".jsonl": read_jsonl, ".parquet": read_parquet}
