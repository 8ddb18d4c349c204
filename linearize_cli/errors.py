"""The errors that a user can cause. Each says what is wrong, where, and what to do next."""

from collections.abc import Iterable

LINES, WIDTH = 10, 800  # largest message, because it may quote a user's value of any length


class UserError(Exception):
    """An error in usage, input or network. It is shown as a few lines without a traceback, with exit code 2.

    Args:
        what: one line that says what is wrong and where.
        hint: what to do next, in one or more lines.
    """

    exit_code = 2

    def __init__(self, what: str, hint: str = ""):
        super().__init__(shortened(what if not hint else f"{what}\n{hint}"))
        self.what, self.hint = what, hint


class CheckFailed(UserError):
    """A failed check (the self-check, or a FAIL of `verify`), with exit code 1."""

    exit_code = 1


class Notice(UserWarning):
    """A warning for the user. The commands show it as a line of text."""


def shortened(message: str) -> str:
    """Cut a message to at most LINES lines of WIDTH characters. The last line, which says what to do, is
    kept.
    """
    lines = message.strip().splitlines()
    if len(lines) > LINES:
        lines = [*lines[: LINES - 2], f"... ({len(lines) - LINES + 1} more lines)", lines[-1]]
    half = WIDTH // 2 - 3
    return "\n".join(x if len(x) <= WIDTH else f"{x[:half]} ... {x[-half:]}" for x in lines)


def first_five(names: Iterable[str]) -> str:
    """Return the first five names in alphabetical order, separated by commas, and the number of the remaining
    ones.
    """
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
