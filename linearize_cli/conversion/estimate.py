"""`convert --dry-run`: the memory, disk space and time of a conversion, with the arithmetic of every line."""

import time
from dataclasses import dataclass, field
from typing import Any

import torch

from linearize_cli.conversion.costs import FP32, Costs
from linearize_cli.training.distillation import LOGITS
from linearize_cli.training.job import Job

TRAINED = 16  # bytes of a trained parameter: itself, its gradient and two averages of AdamW, 4 each
KEPT = 12  # bytes of a trained parameter in a training checkpoint, which holds no gradient
ASSUMED = 100e12  # FLOP/s of a GPU that is not here
HEAD_COPIES = 4  # tensors of all logits of Medusa heads: themselves, log-probabilities, and two gradients
MEASURED = 3  # tensors of all logits that measuring a perplexity keeps
COPIES = 6  # tensors of all logits: student and teacher, their log-probabilities, and two gradients
# Share of all memory but the weights that the C library of a CPU keeps in freed blocks, at most (measured).
ALLOCATOR = 0.7
MEASUREMENTS = ("teacher", "swapped", "transferred", "recovered", "local only", "linear only")
SEGMENT = 1024  # tokens whose features and scores exist at a time, where the backward computes them again


@dataclass
class Estimate:
    """The estimate of a conversion, section by section.

    Attributes:
        costs: the sizes and FLOPs that the estimate is computed from.
        job: the run configuration, with its batch size resolved.
        length: tokens of a block.
        itemsize: bytes of one number in the model's dtype.
        processes: number of training processes, which share the weights and the batch.
        rows: blocks that are in memory of a process at a time.
        device: the torch device to train on.
        flops: FLOP/s of one process.
        source: where `flops` comes from, for the report.
        lines: the lines so far, each with `section`, `what`, `arithmetic`, `value` and `unit`.
        section: the section of the next lines.
    """

    costs: Costs
    job: Job
    length: int
    itemsize: int
    processes: int
    rows: int
    device: str
    flops: float = 1.0
    source: str = ""
    lines: list[dict[str, Any]] = field(default_factory=list, init=False)
    section: str = field(default="", init=False)

    def __post_init__(self):
        recover, per_step = self.job.recipe.recover, self.length * self.job.batch_size
        self.tokens, self.batch = self.rows * self.length, f"{self.rows} x {self.length} tokens"
        self.shared = f" / {self.processes} processes" if self.processes > 1 else ""
        steps = recover.tokens // per_step if self.job.train else 0
        transfer = round(steps * recover.transfer.share) if self.costs.linear else 0
        self.budget = {"transfer": transfer * per_step, "distill": (steps - transfer) * per_step}
        self.size, layers = recover.transfer.block_layers or 1, len(self.costs.layers)
        kept = self.costs.kept
        self.kept_transfer = [layer.transfer(self.tokens) for layer in kept]
        self.kept_distill = [layer.distill(self.tokens) for layer in kept]
        self.blocks = [range(i, min(i + self.size, layers)) for i in range(0, layers, self.size)]
        self.lora = recover.distill.lora
        self.kind = "LoRA" if self.lora else "the model's own"

    def all(self) -> list[dict[str, Any]]:
        """Return the lines of all sections."""
        self.model()
        self.transfer()
        if self.blocks:
            self.transfer_by_blocks()
        self.distillation()
        self.measuring()
        if self.job.medusa_heads:
            self.medusa()
        self.disk()
        self.time()
        return self.lines

    def peaks(self) -> list[float]:
        """Return the bytes of each stage that the conversion has, as the recipe sets it."""
        recover = self.job.recipe.recover
        peaks = [self.measuring(), *([self.medusa()] if self.job.medusa_heads else [])]
        if self.budget["transfer"]:
            peaks.append(self.transfer_by_blocks() if recover.transfer.block_layers else self.transfer())
        if self.budget["distill"]:
            whole, less = self.distillation()
            peaks.append(less if recover.distill.checkpointing else whole)
        return peaks

    def add(self, what: str, arithmetic: str, value: float, unit: str = "B") -> float:
        """Add a line to the current section and return its value.

        Args:
            what: what the value is.
            arithmetic: how it was computed, as text.
            unit: `B` for bytes.
        """
        line = {"section": self.section, "what": what, "arithmetic": arithmetic, "value": value, "unit": unit}
        self.lines.append(line)
        return value

    def total(self, fixed: int | None = None) -> float:
        """Add a line with the sum of the section's lines and return that sum.

        On a CPU, a line before it adds the memory that the allocator keeps for freed blocks.

        Args:
            fixed: the number of first lines of the section that count weights, which are allocated once. None:
                nothing of the section is in memory.
        """
        values = [line["value"] for line in self.lines if line["section"] == self.section]
        if self.device == "cpu" and fixed is not None:
            arithmetic = f"{ALLOCATOR:g} x everything but the weights"
            values.append(
                self.add("freed blocks of the allocator", arithmetic, ALLOCATOR * sum(values[fixed:]))
            )
        return self.add("in all", "the sum", sum(values))

    def model(self) -> None:
        self.section, c = "the model", self.costs
        targets = (
            f"rank {self.lora.rank}, targets {self.lora.targets}" if self.lora else "all but the embeddings"
        )
        self.add("parameters", "of the base model", c.parameters, "parameters")
        self.add("linear parameters", "added by the conversion, fp32", c.linear, "parameters")
        self.add(
            f"{self.kind} parameters", f"trained by distillation: {targets}, fp32", c.others, "parameters"
        )

    def transfer(self) -> float:
        self.section = "on the device, transfer of all layers at once" + (
            ", each process" if self.shared else ""
        )
        self.weights()
        self.trained("linear parameters", self.costs.linear, self.processes)
        self.working()
        self.kept(self.kept_transfer, ", all layers")
        return self.total(2 if self.shared else 1)

    def transfer_by_blocks(self) -> float:
        c = self.costs
        self.section = f"on the device, transfer by blocks (recover.transfer.block_layers {self.size})"
        outside, what = c.bytes - sum(c.layers), "weights outside the layers"
        if self.device == "cpu":  # the blocks are copies there
            outside, what = c.bytes, "weights"
        self.add(what, "of the checkpoint" if self.device == "cpu" else "embeddings, norms, head", outside)
        largest = max(sum(c.layers[i] for i in block) for block in self.blocks)
        self.add("weights of a block", f"{self.size} of {len(c.layers)} layers, the largest block", largest)
        learning = sum(layer.trained for layer in c.kept)
        self.trained("its linear parameters", -(-c.linear * self.size // max(1, learning)))
        self.working()
        self.kept(max(([self.kept_transfer[i] for i in block] for block in self.blocks), key=sum))
        return self.total(2)

    def distillation(self) -> tuple[float, float]:
        """Add the lines of distillation.

        Returns:
            the bytes without and with gradient checkpointing.
        """
        self.section = "on the device, distillation" + (", each process" if self.shared else "")
        c = self.costs
        self.weights()
        if c.copied:
            self.add("the teacher's weights", f"a frozen copy{self.shared}", c.copied / self.processes)
        self.trained(f"linear and {self.kind} parameters", c.linear + c.others, self.processes)
        logits = min(self.tokens * c.vocabulary, LOGITS)
        self.add(
            "head and loss",
            f"({COPIES} x {logits:,} logits + {self.batch} x {c.width}) x {FP32} B",
            (COPIES * logits + self.tokens * c.width) * FP32,
        )
        self.working()
        kept = self.kept(self.kept_distill, ", all layers")
        less = total = self.total(1 + bool(self.shared) + bool(c.copied))
        if self.blocks:
            most, layers = max(self.kept_distill), len(self.kept_distill)
            inputs = self.tokens * (layers * c.width * self.itemsize + most)
            arithmetic = f"{self.batch} x ({layers} layers x {c.width} x {self.itemsize} B + one layer's {most:,.0f} B)"
            self.add("kept, gradient checkpointing", arithmetic, inputs)
            saved = (kept - inputs) * (1 + ALLOCATOR if self.device == "cpu" else 1)
            less = self.add("in all, gradient checkpointing", "with that in its place", total - saved)
        return total, less

    def measuring(self) -> float:
        self.section, c = "on the device, measuring" + (", each process" if self.shared else ""), self.costs
        if (
            self.job.recipe.recover.transfer.block_layers
            and self.device != "cpu"
            and not self.budget["distill"]
        ):
            largest = c.bytes - sum(c.layers) + max(c.layers)
            self.add("weights", "outside the layers, and the largest layer", largest)
        else:
            self.weights()
        logits = min(self.tokens * c.vocabulary, LOGITS)
        self.add("head and loss", f"{MEASURED} x {logits:,} logits x {FP32} B", MEASURED * logits * FP32)
        self.working()
        return self.total(2 if self.shared else 1)

    def medusa(self) -> float:
        self.section, c = (
            "on the device, Medusa heads" + (", each process" if self.shared else ""),
            self.costs,
        )
        self.weights()
        self.trained("heads", self.job.medusa_heads * c.width * (c.width + 1 + c.vocabulary))
        logits = min(self.tokens * self.job.medusa_heads * c.vocabulary, LOGITS)
        self.add(
            "logits and loss", f"{HEAD_COPIES} x {logits:,} logits x {FP32} B", HEAD_COPIES * logits * FP32
        )
        self.working()
        return self.total(2 if self.shared else 1)

    def weights(self) -> None:
        c = self.costs
        self.add("weights", f"of the checkpoint{self.shared}", c.bytes / self.processes)
        if self.shared and c.layers:
            self.add("a layer, gathered", "the largest", max(c.layers))

    def trained(self, what: str, count: int, processes: int = 1) -> None:
        shared = self.shared if processes > 1 else ""
        arithmetic = f"{count:,} x {TRAINED} B{shared}: fp32, gradient, AdamW"
        self.add(what, arithmetic, count * TRAINED / processes)

    def working(self) -> None:
        c, tokens = self.costs, min(self.tokens, SEGMENT)
        self.add("one layer's forward", f"{self.batch} x {c.forward:,.0f} B", self.tokens * c.forward)
        if inner := c.recomputed(self.tokens):
            self.add("within linear attention", f"{tokens} tokens x {inner:,} B", tokens * inner)

    def kept(self, per_layer: list[float], layers: str = "") -> float:
        arithmetic = f"{self.batch} x {sum(per_layer):,.0f} B{layers}"
        return self.add("kept for backward", arithmetic, self.tokens * sum(per_layer))

    def disk(self) -> None:
        self.section, c, tokens = "on disk", self.costs, self.budget["transfer"]
        self.add("artifact", f"the weights + {c.linear:,} x {FP32} B", c.bytes + FP32 * c.linear)
        most = c.linear + (c.others if self.budget["distill"] else 0)
        self.add("training checkpoint", f"{most:,} x {KEPT} B: fp32, AdamW", most * KEPT)
        times = min(2, len(self.blocks) - 1) if self.job.recipe.recover.transfer.block_layers else 0
        arithmetic = f"{times} x {tokens:,} tokens x {c.width} x {self.itemsize} B"
        self.add("hidden states between blocks", arithmetic, times * tokens * c.width * self.itemsize)
        self.total()

    def time(self) -> None:
        self.section, c, unit = "time", self.costs, "FLOP/token"
        speed = self.processes * self.add("FLOP/s of a process", self.source, self.flops, "FLOP/s")
        arithmetic = f"2 x {c.products:,.0f} multiply-adds a token"
        forward = self.add("forward, outside attention", arithmetic, 2 * c.products, unit)
        seen = f"{'half ' if c.softmax else ''}of {self.length} tokens"
        arithmetic = f"2 x heads x (key + value size) x {seen}, all layers"
        teacher = self.add("softmax attention", arithmetic, c.softmax + c.stays, unit)
        arithmetic = "2 x (local scores + features within a chunk + state + parameters), all layers"
        linear = self.add("linear attention", arithmetic, c.attention, unit)
        arithmetic = "forward + softmax attention + 3 x linear attention (forward, backward)"
        transfer = self.add("transfer", arithmetic, forward + teacher + 3 * linear, unit)
        arithmetic = (
            "3 x forward (teacher, student, backward to activations) + softmax attention "
            "+ 3 x (linear + kept softmax)"
        )
        distill = self.add("distill", arithmetic, 3 * forward + teacher + 3 * (linear + c.stays), unit)
        seconds = 0.0
        for stage, per_token in (("transfer", transfer), ("distill", distill)):
            tokens = self.budget[stage]
            arithmetic = (
                f"{tokens:,} tokens x {per_token:.4g} FLOP / ({self.processes} x {self.flops:.3g} FLOP/s)"
            )
            seconds += self.add(f"{stage} time", arithmetic, tokens * per_token / speed, "s")
        forwards = len(MEASUREMENTS) if self.job.train else len(MEASUREMENTS) - 2
        per_token = forward + c.softmax + c.stays
        arithmetic = f"{forwards} x at most {self.job.eval_tokens:,} tokens x {per_token:.4g} FLOP"
        seconds += self.add(
            "measuring time", arithmetic, forwards * self.job.eval_tokens * per_token / speed, "s"
        )
        again = self.budget["distill"] * (forward + linear + c.stays) / speed
        self.add("gradient checkpointing", "the student's forward again", again, "s")
        if self.job.medusa_heads:
            tokens, head = sum(self.budget.values()), 6 * c.width * (c.width + c.vocabulary)
            per_token = forward + linear + c.stays + self.job.medusa_heads * head
            arithmetic = f"{tokens:,} tokens x (forward + {self.job.medusa_heads} heads x {head:,} FLOP)"
            seconds += self.add("Medusa heads", arithmetic, tokens * per_token / speed, "s")
        if self.job.recipe.recover.distill.checkpointing:
            self.add("in all", "the sum", seconds + again, "s")
        else:
            self.add("in all", "the sum without gradient checkpointing", seconds, "s")


def measured_flops(device: str, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a matrix product on the device: the best of four products."""
    size = 8192 if torch.device(device).type != "cpu" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
