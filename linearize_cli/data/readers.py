"""Readers of text, JSONL and parquet files. Each yields the documents of a file."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from linearize_cli.errors import UserError, first_five
from linearize_cli.inputs import without_surrogates
from linearize_cli.terminal import Terminal

PART = 1 << 20  # characters of a text file that are read at once
TEXT, CHATS = "text", ("messages", "conversations")
SPEAKERS = {"human": "user", "gpt": "assistant"}  # the roles of ShareGPT files, and the usual names


class BadRow(UserError):
    """A row that cannot be used: it has no text, is not valid, or the chat template refuses it.

    Args:
        where: the file and line, or the dataset and row.
        what: what is wrong with it.
        hint: what to do.
    """

    def __init__(self, where: str, what: str, hint: str = "Correct or remove it."):
        super().__init__(f"{where}: {what}", f"{hint} Or pass --skip-bad-rows N to skip up to N such rows.")
        self.where = where


@dataclass
class BadRows:
    """The rows of a run that cannot be used and were skipped.

    Attributes:
        allowed: the number of rows that may be skipped. One more is an error.
        skipped: the places (file and line) of the skipped rows. A row that is read twice counts once.
        reported: the number of skipped rows in the last report to the user.
    """

    allowed: int = 0
    skipped: set[str] = field(default_factory=set)
    reported: int = 0

    def skip(self, error: BadRow) -> None:
        """Skip the row of an error, or raise the error if no more rows may be skipped.

        Raises:
            BadRow: the allowed number of rows has been skipped already.
        """
        if error.where not in self.skipped and len(self.skipped) >= self.allowed:
            raise error
        self.skipped.add(error.where)

    def report(self, terminal: Terminal) -> None:
        """Print the number of skipped rows if it has grown since the last report."""
        if len(self.skipped) > self.reported:
            self.reported = len(self.skipped)
            where = first_five(self.skipped)
            terminal.note(f"skipped rows that cannot be used: {self.reported} ({where})")


class Row(list):
    """A document that was read from one row of a file or dataset: a list of strings (its text in parts).

    Attributes:
        where: the file and line, or the dataset and row.
    """

    def __init__(self, content: Iterable[Any], where: str = "the row"):
        super().__init__(content)
        self.where = where


class Chat(Row):
    """A document that is a list of messages (dicts with `role` and `content`), as chat templates expect."""


# A document is a stream of text parts, so that a long one is never in memory as a whole.
Document = Iterable[str] | Chat


def document(row: Any, where: str) -> Document | None:
    """Return the document of a row: its text, or its chat if it has no text. Return None for an empty row.

    Lone surrogates, which are not valid Unicode, become U+FFFD.

    Args:
        row: the parsed row.
        where: the file and line, or the dataset and row.

    Raises:
        BadRow: the row has neither field, or the field has the wrong type.
    """
    if not isinstance(row, dict) or not {TEXT, *CHATS} & row.keys():
        raise BadRow(
            where,
            "the row has no `text` and no `messages` field",
            'A row must read like {"text": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]}.',
        )
    if text := row.get(TEXT):
        if not isinstance(text, str):
            raise BadRow(where, "`text` is not a string")
        return Row([without_surrogates(text)], where)
    messages = next(filter(None, map(row.get, CHATS)), None)
    if not messages:
        return None
    if not isinstance(messages, list) or not all(map(is_message, messages)):
        raise BadRow(where, "the messages are not a list of objects with `role` and `content`")
    return Chat(map(message, without_surrogates(messages)), where)


def is_message(entry: Any) -> bool:
    """Return True if an entry is a message of a chat, in the usual form (`role`) or in ShareGPT's (`from`,
    `value`).
    """
    return isinstance(entry, dict) and ("role" in entry or {"from", "value"} <= entry.keys())


def message(entry: dict[str, Any]) -> dict[str, Any]:
    """Return a message with `role` and `content`, converted from ShareGPT's form if needed."""
    if "role" in entry:
        return entry
    speaker = entry["from"]
    return {
        "role": SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker,
        "content": entry["value"],
    }


def documents(rows: Iterable[tuple[str, Any]], bad: BadRows) -> Iterator[Document]:
    """Yield the documents of rows, without the empty ones.

    Args:
        rows: pairs of a place (file and line) and a row. A row may be a BadRow, if it could not be parsed.
        bad: counts the skipped rows.

    Raises:
        BadRow: more rows are bad than may be skipped.
    """
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
    """Yield the text of a file as one document, or nothing if the file is empty.

    Args:
        bad: not used, because a text file has no rows.

    Raises:
        UserError: the file cannot be read, or is not UTF-8.
    """

    def parts() -> Iterator[str]:
        try:
            with file.open(encoding="utf-8-sig") as stream:
                while part := stream.read(PART):
                    yield part + stream.readline()  # end at a line end, so that no word is cut
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not UTF-8 text: {error}", "Convert it to UTF-8.") from None
        except OSError as error:
            raise UserError(
                f"cannot read {file}: {error.strerror or error}", "Check its permissions."
            ) from None

    if file.stat().st_size:
        yield parts()


def read_jsonl(file: Path, bad: BadRows) -> Iterator[Document]:
    """Yield a document for each line of a JSONL file, without empty ones. `bad` counts the rows that are
    skipped.

    Raises:
        BadRow: more rows are bad than may be skipped.
    """

    def rows() -> Iterator[tuple[str, Any]]:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    where = f"{file}, line {number}"
                    yield where, json_row(line, where, "utf-8-sig" if number == 1 else "utf-8")

    return documents(rows(), bad)


def json_row(line: bytes, where: str, encoding: str) -> Any:
    """Return the value of one line of JSON. If the line cannot be parsed, return a BadRow without raising it.

    Args:
        where: the file and line.
    """
    try:
        return json.loads(line.decode(encoding))
    except UnicodeDecodeError:
        return BadRow(where, "it is not UTF-8 text", "Convert the file to UTF-8, or correct the line.")
    except (ValueError, RecursionError) as error:
        return BadRow(where, f"it is not valid JSON: {error}")


def read_parquet(file: Path, bad: BadRows) -> Iterator[Document]:
    """Yield a document for each row of a parquet file, without empty ones. `bad` counts the rows that are
    skipped.

    Raises:
        UserError: the file cannot be read, or has no column with text or chats.
        BadRow: more rows are bad than may be skipped.
    """
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
            raise UserError(
                f"{file} has no `text` or `messages` column", f"Its columns are {', '.join(names)}."
            )
        yield from documents(rows(), bad)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(
            f"cannot read {file}: {error}", "The file is damaged or not a parquet file."
        ) from None


READERS = {".txt": read_text, ".md": read_text, ".jsonl": read_jsonl, ".parquet": read_parquet}
