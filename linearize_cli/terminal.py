"""What a person sees: results on standard output, progress and errors on standard error."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

Advance = Callable[[int], None]
WIDTH = 120  # of results that go to a file or a pipe


class TokensPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} tokens/s")


class Terminal:
    """Where the commands write. `quiet` silences progress and notes, never results or errors."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.out = Console(width=None if sys.stdout.isatty() else WIDTH, markup=False)
        self.err = Console(stderr=True, markup=False)

    def note(self, text: str) -> None:
        """A line about what is going on."""
        if not self.quiet:
            self.err.print(text, highlight=False, soft_wrap=True)

    @contextmanager
    def progress(self, title: str, total: int, done: int = 0) -> Iterator[Advance]:
        """A bar over `total` tokens, with tokens/s and time left; yields a function that advances it."""
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
    print(f"error: {text}", file=sys.stderr)
