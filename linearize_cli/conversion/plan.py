"""The plan of a conversion: how much of a training step is in memory at a time, so that it fits the machine."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from linearize_cli.conversion.costs import costs
from linearize_cli.conversion.estimate import Estimate
from linearize_cli.conversion.layer_selection import chosen_layers
from linearize_cli.conversion.phantom import Phantom
from linearize_cli.conversion.preflight import (
    check_budget,
    check_checkpointing,
    check_length,
    check_task,
    with_batch_size,
    with_loss_weights,
)
from linearize_cli.data.names import SELF
from linearize_cli.errors import UserError
from linearize_cli.models.device import checked_dtype, free_memory, is_here, working_dtype
from linearize_cli.models.layer import Layer
from linearize_cli.models.load import load_shape
from linearize_cli.models.tasks import task_class
from linearize_cli.tables import size
from linearize_cli.training.job import Job
from linearize_cli.training.student import checkpointable

HEADROOM = 0.9  # share of the free memory that a plan uses, because other programs need some too
BLOCKS = (32, 16, 8, 4, 2, 1)  # layers on the device at a time, to choose from


@dataclass(frozen=True)
class Memory:
    """The memory that a plan may use.

    Attributes:
        limit: the number of bytes. None: it is not known.
        stated: True if the user has stated it, so that a plan must fit.
    """

    limit: int | None
    stated: bool

    @classmethod
    def of(cls, asked: int | None, device: str, sharing: int = 1) -> "Memory":
        """Return the memory that a user asks for, or by default most of what a device has free.

        Args:
            asked: the number of bytes, or None.
            sharing: the number of processes that share the device.
        """
        if asked is not None:
            return cls(asked, stated=True)
        free = round(HEADROOM * free_memory(device) / sharing) if is_here(device) else None
        return cls(free, stated=False)


@dataclass(frozen=True)
class Plan:
    """The part of a training step that is in memory at a time. None of it changes the result, except `transfer_only`.

    Attributes:
        device, dtype: the torch device and the dtype that the work is done in.
        memory: the bytes that the plan may use. None: no limit is known.
        rows: the blocks that are in memory of a process at a time. The gradients of a step are added up.
        checkpointing: True for gradient checkpointing in distillation.
        block_layers: the number of layers on the device at a time in transfer. 0: all.
        transfer_only: True if distillation does not fit and is left out.
        peak: the estimated largest number of bytes.
    """

    device: str
    dtype: str
    memory: int | None
    rows: int
    checkpointing: bool
    block_layers: int
    transfer_only: bool
    peak: int

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON data."""
        return asdict(self)

    def applied(self, job: Job) -> Job:
        """Return a run configuration whose recipe has the plan's choices."""
        recover = job.recipe.recover
        chosen, tokens = {"block_layers": self.block_layers}, recover.tokens
        if self.transfer_only:  # as many tokens of transfer as with distillation after it
            chosen, tokens = chosen | {"share": 1.0}, round(tokens * recover.transfer.share)
        transfer = recover.transfer.model_copy(update=chosen)
        distill = recover.distill.model_copy(update={"checkpointing": self.checkpointing})
        update = {"transfer": transfer, "distill": distill, "tokens": tokens}
        recover = recover.model_copy(update=update)
        return replace(job, recipe=job.recipe.model_copy(update={"recover": recover}))

    def line(self, job: Job, length: int) -> str:
        """Return the plan as a line of text.

        Args:
            job: the run configuration, with its batch size resolved.
            length: the number of tokens of a block.
        """
        blocks = f"{job.batch_size} blocks" if job.batch_size > 1 else "1 block"
        parts = [f"{self.device}, {self.dtype}", f"{blocks} of {length} tokens a step"]
        if self.rows < job.batch_size:
            parts.append(f"{self.rows} at a time")
        if self.checkpointing:
            parts.append("gradient checkpointing")
        if self.block_layers:
            layers = f"{self.block_layers} layers" if self.block_layers > 1 else "one layer"
            parts.append(f"transfer of {layers} at a time")
        if self.transfer_only:
            parts.append("no distillation, because the whole model does not fit")
        limit = "" if self.memory is None else f" of {size(self.memory)}"
        return f"plan: {', '.join(parts)}; at most {size(self.peak)}{limit}"


@dataclass(frozen=True)
class Planned:
    """A checked and planned conversion, known from its model's config alone.

    Attributes:
        job: the run configuration, with its batch size resolved, and with the plan's choices in its recipe.
        length: the number of tokens of a block.
        plan: what is in memory at a time.
        linear, softmax: the layers that become linear, and those that stay softmax.
        estimate: the arithmetic of the plan.
    """

    job: Job
    length: int
    plan: Plan
    linear: list[Layer]
    softmax: list[Layer]
    estimate: Estimate


def planned(
    job: Job, device: str, processes: int, memory: Memory, trust_remote_code: bool, before: dict[str, Any]
) -> Planned:
    """Check a run configuration with the shapes of its model, and plan the conversion. No weights are read.

    Args:
        device: the torch device to plan for. It need not exist.
        processes: the number of training processes.
        memory: the memory that each process may use on the device.
        before: the plan of an interrupted run that is resumed, as JSON data. Empty for a new run. Its
            `block_layers` and `transfer_only` are kept, because the run's files depend on them.

    Raises:
        UserError: the model cannot be converted with this configuration, or no plan fits the memory.
    """
    shape = load_shape(job.model, job.dtype, trust_remote_code)
    if checked_dtype(job.dtype) is None:
        shape.to(working_dtype(shape.dtype, device))
    dtype = str(shape.dtype).removeprefix("torch.")
    with Phantom():
        linear, softmax = chosen_layers(job, shape)
    job = with_loss_weights(job, task_class(shape))
    check_task(job, type(shape).__name__, task_class(shape), linear)
    check_checkpointing(job, shape)
    length = check_length(job.seq_len, job.recipe, shape)
    job = with_batch_size(job, length)
    check_budget(job, length, processes)
    counted = costs(shape, linear, softmax, job.recipe, length, device)
    estimate = Estimate(counted, job, length, shape.dtype.itemsize, processes, 1, device)
    plan = fitting(estimate, dtype, memory, bool(checkpointable(shape)), before)
    job = plan.applied(job)
    return Planned(job, length, plan, linear, softmax, replace(estimate, job=job, rows=plan.rows))


def fitting(
    estimate: Estimate, dtype: str, memory: Memory, checkpointable: bool, before: dict[str, Any]
) -> Plan:
    """Return the first plan that fits into the memory, from the fastest to the smallest.

    If none fits into the memory that is free, return the smallest: the estimate may be too high.

    Args:
        estimate: the arithmetic, whose rows and recipe are replaced by those of each plan.
        dtype: the name of the dtype that the work is done in.
        checkpointable: True if the model supports gradient checkpointing.
        before: the plan of the run that is resumed.

    Raises:
        UserError: no plan fits into the memory that the user has stated.
    """
    plans = []
    for plan in candidates(estimate, dtype, memory.limit, checkpointable, before):
        own = replace(estimate, job=plan.applied(estimate.job), rows=plan.rows)
        plans.append(replace(plan, peak=round(max(own.peaks()))))
        if memory.limit is None or plans[-1].peak <= memory.limit:
            return plans[-1]
    smallest = min(plans, key=lambda plan: plan.peak)
    if not memory.stated:
        return smallest
    raise UserError(
        f"the smallest plan takes {size(smallest.peak)}, and the memory for it is {size(memory.limit)}",
        "Pass a larger --memory, a smaller --seq-len or another --device. --dry-run without --memory shows what "
        "takes the memory.",
    )


def candidates(
    estimate: Estimate, dtype: str, memory: int | None, checkpointable: bool, before: dict[str, Any]
) -> Iterator[Plan]:
    """Yield plans without their peaks, the fastest first: fewer rows at a time, then gradient checkpointing,
    then blocks of layers, then no distillation.

    Keys of the recipe that the user has set are kept. Blocks of layers need a device other than the CPU, and
    text that the model does not have to write first.
    """
    transfer, distill = estimate.job.recipe.recover.transfer, estimate.job.recipe.recover.distill
    layers = len(estimate.costs.layers)
    blocks, shares = [transfer.block_layers or 0], [False]
    if before:
        blocks, shares = [before["block_layers"]], [before["transfer_only"]]
    elif (
        "block_layers" not in transfer.model_fields_set
        and estimate.device != "cpu"
        and estimate.processes == 1
        and SELF not in estimate.job.data
    ):
        blocks += [n for n in BLOCKS if n < layers]
        by_hand = any(x.startswith("recover.transfer.share=") for x in estimate.job.overrides)
        shares += [True] if transfer.share and not by_hand else []
    again = [distill.checkpointing]
    if "checkpointing" not in distill.model_fields_set and checkpointable and layers:
        again = [False, True]
    rows = -(-estimate.job.batch_size // estimate.processes)
    for transfer_only, block_layers, checkpointing in product(shares, blocks, again):
        if transfer_only and (checkpointing or not block_layers):
            continue
        for own in halves(rows):
            yield Plan(estimate.device, dtype, memory, own, checkpointing, block_layers, transfer_only, 0)


def halves(rows: int) -> list[int]:
    """Return a number of rows, its half, and so on down to 1."""
    return [rows] if rows == 1 else [rows, *halves(-(-rows // 2))]
