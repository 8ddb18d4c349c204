"""Gradient accumulation: the rows of a training step go through the model a few at a time."""

from collections.abc import Callable
from typing import TypeVar

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from linearize_cli.errors import UserError
from linearize_cli.hub import brief
from linearize_cli.terminal import Terminal

Result = TypeVar("Result")
ALL = 1 << 30  # more rows than any batch has


class MicroBatches:
    """The number of rows that are in memory at a time. It is halved when memory runs out.

    The gradients of the parts of a batch are added before the optimizer's step, so the result does not depend
    on this number, except for rounding.

    Attributes:
        rows: the largest number of rows of one process in one forward.
    """

    def __init__(self, rows: int = ALL):
        self.rows = rows

    def run(self, function: Callable[[int], Result], batch: int, terminal: Terminal, alone: bool) -> Result:
        """Call a function with the number of rows. If memory runs out, halve that number and call it again.

        Args:
            function: the work. It may be called several times.
            batch: the number of rows of the whole batch.
            alone: True if this is the only process. Several processes would have to repeat the work together.

        Raises:
            UserError: memory runs out with a single row, or with several processes.
        """
        while True:
            rows = min(self.rows, batch)
            try:
                return function(rows)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                what = brief(error)  # the error itself would keep the tensors of the failed forward alive
            if rows == 1 or not alone:
                raise UserError(
                    f"memory ran out with {rows} rows at a time: {what}",
                    "A smaller --memory plans for less, with --resume too. Or start over with a smaller --seq-len.",
                )
            self.rows = -(-rows // 2)
            clear_device_cache(garbage_collection=True)
            terminal.note(f"memory ran out: the step is repeated with {self.rows} rows at a time")
