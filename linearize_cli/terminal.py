"""The terminal: results on standard output, progress and errors on standard error."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

Advance = Callable[[int], None]
WIDTH = 120  # columns of results that are written to a file or a pipe


class TokensPerSecond(ProgressColumn):
    """The column of a progress bar with the tokens per second."""

    def render(self, task: Task) -> Text:
        """Return the speed, or nothing before it is known."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} tokens/s")


class Terminal:
    """The output streams of the commands: results on standard output, progress and notes on standard error.

    Args:
        quiet: True to hide progress and notes. Results and errors are always shown.
    """

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.out = Console(width=None if sys.stdout.isatty() else WIDTH, markup=False)
        self.err = Console(stderr=True, markup=False)

    def note(self, text: str) -> None:
        """Print a line about the progress of a command, unless `quiet` is set."""
        if not self.quiet:
            self.err.print(text, highlight=False, soft_wrap=True)

    @contextmanager
    def progress(self, title: str, total: int, done: int = 0) -> Iterator[Advance]:
        """Show a progress bar over `total` tokens, with tokens/s and the time left, while the context is
        open.

        Args:
            title: the text before the bar.
            done: the number of tokens that an earlier run has processed.

        Yields:
            A function that advances the bar by a number of tokens.
        """
        columns = (
            TextColumn("{task.description:<12}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TokensPerSecond(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        )
        with Progress(*columns, console=self.err, disable=self.quiet) as bar:
            task = bar.add_task(title, total=total, completed=done)
            yield lambda tokens: bar.advance(task, tokens)


def fail(text: str) -> None:
    """Print an error to standard error."""
    print(f"error: {text}", file=sys.stderr)
