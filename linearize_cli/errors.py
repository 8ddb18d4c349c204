"""The errors a user can cause. Each says what went wrong, where, and what to do next."""

from collections.abc import Iterable


class UserError(Exception):
    """A fault in usage, input or network: a few lines of text, exit code 2, no traceback.

    Args:
        what: one line, what is wrong and where.
        hint: what to do next; optional further lines.
    """

    exit_code = 2

    def __init__(self, what: str, hint: str = ""):
        super().__init__(what if not hint else f"{what}\n{hint}")
        self.what, self.hint = what, hint


class CheckFailed(UserError):
    """A check said no (a self-check that refused, verify's FAIL): exit code 1."""

    exit_code = 1


def first_five(names: Iterable[str]) -> str:
    """The first five names in order, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
