"""Rows of files and datasets as documents."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from linearize_cli.errors import UserError, first_five
from linearize_cli.inputs import mended
from linearize_cli.terminal import Terminal

PIECE = 1 << 20  # characters of a text file read at once
TEXT, CHATS = "text", ("messages", "conversations")
SPEAKERS = {"human": "user", "gpt": "assistant"}  # as ShareGPT's files call them


class BadRow(UserError):
    """A row that cannot be used.

    Args:
        where: the file and line, or the dataset and row.
    """

    def __init__(self, where: str, what: str, hint: str = "Correct or remove it."):
        super().__init__(
            f"{where}: {what}", f"{hint} Or pass --skip-bad-rows N to leave out up to N such rows."
        )
        self.where = where


@dataclass
class BadRows:
    """The rows of a run that cannot be used.

    Attributes:
        allowed: how many of them are left out; one more is an error.
        skipped: where those are that were left out, each once, however often it is read.
        reported: how many of them the user knows of.
    """

    allowed: int = 0
    skipped: set[str] = field(default_factory=set)
    reported: int = 0

    def skip(self, error: BadRow) -> None:
        """Leave a row out. Raises BadRow: too many are left out already."""
        if error.where not in self.skipped and len(self.skipped) >= self.allowed:
            raise error
        self.skipped.add(error.where)

    def report(self, terminal: Terminal) -> None:
        """Write how many rows are left out, if more are than before."""
        if len(self.skipped) > self.reported:
            self.reported = len(self.skipped)
            where = first_five(self.skipped)
            terminal.note(f"rows left out because they cannot be used: {self.reported} ({where})")


class Row(list):
    """A document that is a row: the pieces of its text.

    Attributes:
        where: the file and line, or the dataset and row.
    """

    def __init__(self, content: Iterable[Any], where: str = "the row"):
        super().__init__(content)
        self.where = where


class Chat(Row):
    """A document that is a list of messages, as a chat template takes them."""


# A document as pieces of text, so that a long one is never whole in memory.
Document = Iterable[str] | Chat


def document(row: Any, where: str) -> Document | None:
    """Return what a row holds: its text, or its chat where it has no text. None if the row is empty.

    Lone surrogates, which are not valid Unicode, become U+FFFD.

    Raises:
        BadRow: the row has no field for either, or something else in it.
    """
    if not isinstance(row, dict) or not {TEXT, *CHATS} & row.keys():
        raise BadRow(
            where,
            "no row with a `text` or a `messages` field",
            'A row must read like {"text": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]}.',
        )
    if text := row.get(TEXT):
        if not isinstance(text, str):
            raise BadRow(where, "`text` is no string")
        return Row([mended(text)], where)
    messages = next(filter(None, map(row.get, CHATS)), None)
    if not messages:
        return None
    if not isinstance(messages, list) or not all(map(is_message, messages)):
        raise BadRow(where, "its messages are no list of objects with `role` and `content`")
    return Chat(map(message, mended(messages)), where)


def is_message(entry: Any) -> bool:
    return isinstance(entry, dict) and ("role" in entry or {"from", "value"} <= entry.keys())


def message(entry: dict[str, Any]) -> dict[str, Any]:
    """A message as chat templates take it, of one in ShareGPT's form too."""
    if "role" in entry:
        return entry
    speaker = entry["from"]
    return {
        "role": SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker,
        "content": entry["value"],
    }


def documents(rows: Iterable[tuple[str, Any]], bad: BadRows) -> Iterator[Document]:
    """Yield the documents of rows that are not empty. A row comes with where it is; it may be a BadRow."""
    for where, row in rows:
        try:
            if isinstance(row, BadRow):
                raise row
            found = document(row, where)
        except BadRow as error:
            bad.skip(error)
        else:
            if found is not None:
                yield found


def read_text(file: Path, bad: BadRows) -> Iterator[Document]:
    def pieces() -> Iterator[str]:
        try:
            with file.open(encoding="utf-8-sig") as stream:
                while piece := stream.read(PIECE):
                    yield piece + stream.readline()  # end at a line, so that no word is cut
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is no UTF-8 text: {error}", "Convert it to UTF-8.") from None
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror or error}", "Check its rights.") from None

    if file.stat().st_size:
        yield pieces()


def read_jsonl(file: Path, bad: BadRows) -> Iterator[Document]:
    def rows() -> Iterator[tuple[str, Any]]:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    where = f"{file}, line {number}"
                    yield where, json_row(line, where, "utf-8-sig" if number == 1 else "utf-8")

    return documents(rows(), bad)


def json_row(line: bytes, where: str, encoding: str) -> Any:
    """Return what a line of JSON holds, or a BadRow."""
    try:
        return json.loads(line.decode(encoding))
    except UnicodeDecodeError:
        return BadRow(where, "no UTF-8 text", "Convert the file to UTF-8, or correct the line.")
    except (ValueError, RecursionError) as error:
        return BadRow(where, f"no valid JSON: {error}")


def read_parquet(file: Path, bad: BadRows) -> Iterator[Document]:
    import pyarrow.parquet

    def rows() -> Iterator[tuple[str, Any]]:
        number = 0
        for batch in table.iter_batches(columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield f"{file}, row {number}", row

    try:
        table = pyarrow.parquet.ParquetFile(file)
        names = table.schema_arrow.names
        columns = [name for name in (TEXT, *CHATS) if name in names]
        if not columns:
            raise UserError(f"{file} has no `text` or `messages` column", f"Its columns: {', '.join(names)}.")
        yield from documents(rows(), bad)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read {file}: {error}", "It is damaged, or no parquet file.") from None


READERS = {".txt": read_text, ".md": read_text, ".jsonl": read_jsonl, ".parquet": read_parquet}
