"""`convert --dry-run`: what a conversion takes in memory, disk and time, with the arithmetic of every line."""

import time
from typing import Any

import torch

from linearize_cli.conversion.costs import Costs
from linearize_cli.training.job import Job

TRAINED = 16  # bytes of a parameter that learns: itself, its gradient and AdamW's two averages, 4 each
KEPT = 12  # and of one in a training checkpoint, without its gradient


class Lines:
    """The lines of an estimate: what, how it comes about, and the number."""

    def __init__(self):
        self.lines: list[dict[str, Any]] = []
        self.section = ""

    def add(self, what: str, arithmetic: str, value: float, unit: str = "B") -> float:
        self.lines.append(
            {"section": self.section, "what": what, "arithmetic": arithmetic, "value": value, "unit": unit}
        )
        return value

    def total(self, what: str, *values: float) -> None:
        self.add(what, "the sum", sum(values))


def estimate(
    costs: Costs, job: Job, length: int, itemsize: int, processes: int, flops: float, source: str
) -> list[dict[str, Any]]:
    """
    Args:
        length: tokens of a block; itemsize: bytes of a number in the model's dtype.
        flops: a second, of one process; source: where that number comes from.

    Returns:
        Lines of `section`, `what`, `arithmetic`, `value` and `unit`.
    """
    out, c, recover = Lines(), costs, job.recipe.recover
    rows = -(-job.batch_size // processes)
    tokens, of_n = rows * length, f" / {processes} processes" if processes > 1 else ""
    batch = f"{rows} x {length} tokens"
    size = recover.transfer.block_layers or 1
    spans = [range(i, min(i + size, len(c.layers))) for i in range(0, len(c.layers), size)]
    steps = recover.tokens // (length * job.batch_size) if job.train else 0
    transfer = round(steps * recover.transfer.share) if c.linear else 0
    budget = {
        "transfer": transfer * length * job.batch_size,
        "distill": (steps - transfer) * length * job.batch_size,
    }

    out.section = "the model"
    out.add("parameters", "of the base model", c.parameters, "parameters")
    out.add("linear parameters", "added by the conversion, fp32", c.linear, "parameters")
    lora = recover.distill.lora
    kind = "LoRA" if lora else "the model's own"
    reach = f"rank {lora.rank}, targets {lora.targets}, fp32" if lora else "all but the embeddings, fp32"
    out.add(f"{kind} parameters", f"trained by distillation: {reach}", c.others, "parameters")

    def trained(count: int, what: str) -> float:
        return out.add(
            what, f"{count:,} x {TRAINED} B{of_n}: fp32, gradient, AdamW", count * TRAINED / processes
        )

    out.section = "on the device, transfer of all layers at once" + (", each process" if of_n else "")
    weights = out.add("weights", f"of the checkpoint{of_n}", c.bytes / processes)
    gathered = [max(c.layers)] if of_n and c.layers else []
    for value in gathered:
        out.add("a layer, gathered", "the largest", value)
    learning = trained(c.linear, "linear parameters")
    working = out.add("one layer's forward", f"{batch} x {c.forward:,.0f} B", tokens * c.forward)
    kept = out.add(
        "kept for backward", f"{batch} x {sum(c.transfer):,.0f} B, all layers", tokens * sum(c.transfer)
    )
    out.total("in all", weights, *gathered, learning, working, kept)

    if spans:
        out.section = f"on the device, transfer by blocks (recover.transfer.block_layers {size})"
        others = out.add("weights outside the layers", "embeddings, norms, head", c.bytes - sum(c.layers))
        largest = max(sum(c.layers[i] for i in span) for span in spans)
        block = out.add("weights of a block", f"{size} of {len(c.layers)} layers, the largest block", largest)
        share = max(sum(c.transfer[i] for i in span) for span in spans)
        part = -(-c.linear * size // max(1, sum(x > 0 for x in c.transfer)))
        learning = out.add(
            "its linear parameters", f"{part:,} x {TRAINED} B: fp32, gradient, AdamW", part * TRAINED
        )
        out.add("one layer's forward", f"{batch} x {c.forward:,.0f} B", working)
        kept = out.add("kept for backward", f"{batch} x {share:,.0f} B", tokens * share)
        out.total("in all", others, block, learning, working, kept)

    out.section = "on the device, distillation" + (", each process" if of_n else "")
    weights = out.add("weights", f"of the checkpoint{of_n}", c.bytes / processes)
    for value in gathered:
        out.add("a layer, gathered", "the largest", value)
    copied = (
        [out.add("the teacher's weights", f"a frozen copy{of_n}", c.copied / processes)] if c.copied else []
    )
    learning = trained(c.linear + c.others, f"linear and {kind} parameters")
    loss = out.add("head and loss", f"{batch} x {c.loss:,.0f} B", tokens * c.loss)
    kept = out.add(
        "kept for backward", f"{batch} x {sum(c.distill):,.0f} B, all layers", tokens * sum(c.distill)
    )
    out.total("in all", weights, *gathered, *copied, learning, loss, kept)
    if spans:
        each = len(c.distill) * c.width * itemsize + max(c.distill)
        kept = out.add(
            "kept, gradient checkpointing",
            f"{batch} x ({len(c.distill)} layers x {c.width} x {itemsize} B + one layer's {max(c.distill):,.0f} B)",
            tokens * each,
        )
        out.total("in all, gradient checkpointing", weights, *gathered, *copied, learning, loss, kept)

    out.section = "on disk"
    artifact = out.add("artifact", f"the weights + {c.linear:,} x 4 B", c.bytes + 4 * c.linear)
    most = c.linear + (c.others if budget["distill"] else 0)
    checkpoint = out.add("training checkpoint", f"{most:,} x {KEPT} B: fp32, AdamW", most * KEPT)
    between = min(2, len(spans) - 1) if recover.transfer.block_layers else 0
    hidden = out.add(
        "hidden states between blocks",
        f"{between} x {budget['transfer']:,} tokens x {c.width} x {itemsize} B",
        between * budget["transfer"] * c.width * itemsize,
    )
    out.total("in all", artifact, checkpoint, hidden)

    out.section = "time"
    speed = out.add("FLOP/s of a process", source, flops, "FLOP/s")
    forward = out.add(
        "forward, outside attention",
        f"2 x {c.products:,.0f} multiply-adds a token",
        2 * c.products,
        "FLOP/token",
    )
    teacher = out.add(
        "softmax attention",
        f"2 x heads x (key + value size) x {'half ' if c.softmax else ''}of {length} tokens, all layers",
        c.softmax + c.stays,
        "FLOP/token",
    )
    linear = out.add("linear attention", "counted on its own code", c.attention, "FLOP/token")
    per_token = {
        "transfer": out.add(
            "transfer",
            "forward + softmax attention + 3 x linear attention (forward, backward)",
            forward + teacher + 3 * linear,
            "FLOP/token",
        ),
        "distill": out.add(
            "distill",
            "3 x forward (teacher, student, backward to activations) + softmax attention + 3 x (linear + kept softmax)",
            3 * forward + teacher + 3 * (linear + c.stays),
            "FLOP/token",
        ),
    }
    rate = f"/ ({processes} x {speed:.3g} FLOP/s)"
    seconds = [
        out.add(
            f"{stage} time",
            f"{budget[stage]:,} tokens x {per_token[stage]:.4g} FLOP {rate}",
            budget[stage] * per_token[stage] / (processes * speed),
            "s",
        )
        for stage in budget
    ]
    again = budget["distill"] * (forward + linear + c.stays) / (processes * speed)
    out.add("more with gradient checkpointing", "the student's forward again", again, "s")
    out.add("in all", "the sum without it", sum(seconds), "s")
    return out.lines


def measured_flops(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a square product of matrices on the device: the best of a few, under a second or two."""
    size = 8192 if torch.device(device).type != "cpu" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
