"""Recovery: attention transfer, then distillation from the softmax teacher."""

import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

from linearize_cli.conversion.stages import Conversion
from linearize_cli.methods.recipe import learning_rates, transfer_rate
from linearize_cli.models.stored import round_weights
from linearize_cli.runtime.model import linear_parameters
from linearize_cli.training.attention_transfer import Transfer, WindowDropout
from linearize_cli.training.distillation import Distillation
from linearize_cli.training.layerwise_transfer import transfer_by_blocks
from linearize_cli.training.loop import StagePlan, train
from linearize_cli.training.student import checkpointed, merge, student_and_teacher

HELD_OUT = 64  # held-out blocks that select the best parameters


@dataclass(frozen=True)
class Steps:
    """The planned training steps of the two stages, transfer and distillation (0 without training)."""

    transfer: int
    distill: int

    @classmethod
    def of(cls, conversion: Conversion) -> "Steps":
        """Divide the token budget between the stages. There is no transfer without parameters to train."""
        job = conversion.job
        if not job.train:
            return cls(0, 0)
        total = job.recipe.recover.tokens // conversion.text.tokens_per_step
        transfer = round(total * job.recipe.recover.transfer.share)
        if not linear_parameters(conversion.model):
            transfer = 0
        return cls(transfer, total - transfer)

    @property
    def total(self) -> int:
        """Return the number of steps of both stages together."""
        return self.transfer + self.distill


def recover(conversion: Conversion, steps: Steps) -> None:
    """Train the linearized model: transfer, then the selection of softmax layers, then distillation.

    LoRA is merged at the end. A stage without steps is skipped.
    """
    conversion.model.requires_grad_(False)
    for parameter in linear_parameters(conversion.model):
        parameter.requires_grad_(True)
    if steps.transfer:
        if conversion.session.checkpoint.stage != "distill":
            transfer(conversion, steps)
        conversion.keep_softmax()
        conversion.measure("transferred")
    if steps.distill:
        distill(conversion, steps)
    conversion.model.requires_grad_(False)
    round_weights(conversion.model, conversion.stored)  # what is measured is what is saved
    conversion.measure("recovered")
    values = conversion.selected("swapped", "recovered")
    if None not in values.values() and values["recovered"] > values["swapped"]:
        conversion.session.terminal.note(
            "training made the model worse than right after the swap: pass more --tokens, or lower learning rates"
        )


def transfer(conversion: Conversion, steps: Steps) -> None:
    """Train every linear layer to match the output of the softmax layer that it replaces."""
    started, options = time.monotonic(), conversion.job.recipe.recover.transfer
    session, model, native = conversion.session, conversion.model, conversion.native
    windows = WindowDropout(options.window_dropout, steps.transfer, conversion.job.seed)
    batches = conversion.text.batches(session.engine)
    if conversion.by_block:
        objectives = transfer_by_blocks(
            model, native, windows, conversion.by_block, batches, steps.transfer, session
        )
    else:
        objectives = [Transfer(model, native, windows)]
    lr = transfer_rate(options, min(layer.geometry["key_dim"] for layer in conversion.linear))
    plan = StagePlan(
        "transfer", steps.transfer, conversion.text.tokens_per_step, options.model_copy(update={"lr": lr})
    )
    held_out = partial(conversion.text.held_out_batches, session.engine, HELD_OUT)
    for objective in objectives:
        train(plan, objective, batches, session, held_out)
    conversion.add_seconds("transfer", started)


def distill(conversion: Conversion, steps: Steps) -> None:
    """Train the model on its teacher's logits. Then merge LoRA into its weights, if LoRA was used."""
    started, options = time.monotonic(), conversion.job.recipe.recover.distill
    session = conversion.session
    if conversion.by_block:  # distillation needs the whole model on the device
        conversion.model.to(conversion.by_block.device)
        conversion.by_block = None
    width = conversion.model.config.get_text_config().hidden_size
    student, teacher = student_and_teacher(conversion.model, options.lora)
    lr, linear_lr = learning_rates(options, width)
    objective = Distillation(
        student, conversion.native, options, teacher, pooling=conversion.text.task.pooling
    )
    plan = StagePlan(
        "distill",
        steps.distill,
        conversion.text.tokens_per_step,
        options.model_copy(update={"lr": lr, "linear_lr": linear_lr}),
    )
    batches = conversion.text.batches(session.engine, steps.transfer)
    held_out = partial(conversion.text.held_out_batches, session.engine, HELD_OUT)
    with checkpointed(student) if options.checkpointing else nullcontext():
        train(plan, objective, batches, session, held_out)
    if conversion.job.keep_adapter and session.engine.main:
        student.save_pretrained(session.folder / "adapter")
        (session.folder / "adapter/README.md").unlink(missing_ok=True)  # the empty card that peft writes
    conversion.model = merge(student)
    conversion.add_seconds("distill", started)
