"""The errors a user can cause. Each says what went wrong, where, and what to do next."""

from collections.abc import Iterable

LINES, WIDTH = 10, 800  # of a message at most: it may quote a user's value of any length


class UserError(Exception):
    """A fault in usage, input or network: a few lines of text, exit code 2, no traceback.

    Args:
        what: one line, what is wrong and where.
        hint: what to do next; optional further lines.
    """

    exit_code = 2

    def __init__(self, what: str, hint: str = ""):
        super().__init__(shortened(what if not hint else f"{what}\n{hint}"))
        self.what, self.hint = what, hint


class CheckFailed(UserError):
    """A check said no (a self-check that refused, verify's FAIL): exit code 1."""

    exit_code = 1


class Notice(UserWarning):
    """Something that stops nothing and that a user should know. The commands show it as a line of text."""


def shortened(message: str) -> str:
    """Cut a message to LINES lines of WIDTH characters. The last line, which says what to do, stays."""
    lines = message.strip().splitlines()
    if len(lines) > LINES:
        lines = [*lines[: LINES - 2], f"... ({len(lines) - LINES + 1} more lines)", lines[-1]]
    half = WIDTH // 2 - 3
    return "\n".join(x if len(x) <= WIDTH else f"{x[:half]} ... {x[-half:]}" for x in lines)


def first_five(names: Iterable[str]) -> str:
    """The first five names in order, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
