"""What a conversion refuses before it starts."""

import shutil
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from linearize_cli.conversion.layer_selection import measured_count
from linearize_cli.data.names import SELF
from linearize_cli.errors import UserError
from linearize_cli.methods.compatibility import LINEAR, forward_only
from linearize_cli.methods.recipe import Recipe
from linearize_cli.models.layer import Layer
from linearize_cli.models.tasks import CausalLM, Task, context_length
from linearize_cli.training.engine import Engine
from linearize_cli.training.job import Job
from linearize_cli.training.streamed_layers import KEY, LayerBlocks
from linearize_cli.training.student import recomputable

STEPS, LARGEST = 1000, 8  # of a batch that nobody chose


def check_length(seq_len: int | None, recipe: Recipe, model: PreTrainedModel) -> int:
    """Tokens per block: as asked for, else 1024 or the model's context if that is shorter.

    Raises:
        UserError: the blocks, the window or the conv reach beyond the model's context.
    """
    limit = context_length(model)
    local, conv = recipe.attention.local, recipe.attention.conv
    for key, size in (("local.size", local.size if local else 0), ("conv.width", conv.width)):
        if size > limit:
            raise UserError(
                f"attention.{key} {size} is beyond the model's context of {limit}", f"Use at most {limit}."
            )
    if seq_len is None:
        return min(1024, limit)
    if seq_len > limit:
        raise UserError(
            f"--seq-len {seq_len} is beyond the model's context of {limit}", f"Use at most {limit}."
        )
    return seq_len


def with_batch_size(job: Job, length: int) -> Job:
    """The blocks per step: as asked for, else so many, a power of 2, that the budget makes STEPS steps, at most
    LARGEST. At the same tokens, more steps recover more until there are enough of them.
    """
    if job.batch_size is not None:
        return job
    rows = job.recipe.recover.tokens // (length * STEPS)
    return replace(job, batch_size=max(1, min(LARGEST, 1 << rows.bit_length() >> 1)))


def check_task(job: Job, kind: str, task: type[Task], layers: list[Layer]) -> None:
    """Refuse what this kind of model, its class, cannot do.

    Raises:
        UserError: a memory that runs forward in time for layers that see both sides, answers that text does not
            hold, or text that the model cannot write.
    """
    key, distill = forward_only(job.recipe.attention), job.recipe.recover.distill
    if key is not None and not all(layer.causal for layer in layers):
        raise UserError(
            f"{key} of {job.recipe.name} runs forward in time, and {kind} attends to both sides",
            "Choose a method without it, or pass --set attention.memory.kind=none.",
        )
    if job.recipe.attention.cross == LINEAR and not any("cross" in layer.geometry for layer in layers):
        raise UserError(
            f"attention.cross linear: no layer of {kind} to convert attends to an encoder",
            "Pass --set attention.cross=softmax.",
        )
    if distill.ce and not task.answers:
        raise UserError(
            f"recover.distill.ce {distill.ce:g} needs right answers, and text holds none for {kind}",
            "Pass --set recover.distill.ce=0: it learns the teacher's logits.",
        )
    for key in ("separate_documents", "assistant_only"):
        if getattr(job.recipe.recover, key) and task is not CausalLM:
            raise UserError(
                f"recover.{key}: {kind} is no causal language model", f"Pass --set recover.{key}=false."
            )
    if job.medusa_heads and task is not CausalLM:
        raise UserError(
            f"--medusa-heads: {kind} is no causal language model, so it has no next tokens to draft",
            "Leave the option out.",
        )
    if SELF in (*job.data, job.recipe.recover.data) and task is not CausalLM:
        raise UserError(
            f"--data self: {kind} writes no text to learn from", "Pass --data with a file or a dataset."
        )


def check_checkpointing(job: Job, model: PreTrainedModel) -> None:
    """Raises UserError: activations are to be computed again, of a model that has no layers for it."""
    if job.recipe.recover.distill.checkpointing and not recomputable(model):
        raise UserError(
            f"recover.distill.checkpointing: {type(model).__name__} has no layers that can be computed again",
            "Leave it off; a smaller --batch-size saves memory too.",
        )


def check_blocks(job: Job, model: PreTrainedModel, by_block: LayerBlocks, engine: Engine) -> None:
    """Refuse what cannot be done a block at a time.

    Raises:
        UserError: the model is to write its own text, to be spread in shards, or to be distilled on a device that
            does not hold it.
    """
    if SELF in (job.data or (job.recipe.recover.data,)):
        raise UserError(
            f"--data self: a model that is on the device {by_block.size} layers at a time writes too slowly",
            f"Pass --data with a file or a dataset, or --set {KEY}=0.",
        )
    if engine.plugin is not None:
        raise UserError(
            f"{KEY} and FSDP are two ways to hold a model that is too large for a device",
            f"Pass --set {KEY}=0, or run without fsdp_config.",
        )
    if job.medusa_heads and job.recipe.recover.transfer.share == 1:
        raise UserError(
            f"--medusa-heads needs the whole model on the device, and {KEY} with transfer alone never brings it there",
            "Leave the option out, and train heads where the model fits: linearize heads ARTIFACT.",
        )
    if job.train and job.recipe.recover.transfer.share < 1 and by_block.device.startswith("cuda"):
        need, room = model.get_memory_footprint(), torch.cuda.mem_get_info(by_block.device)[1]
        if need > room:
            raise UserError(
                f"distillation needs the whole model on the device: {need >> 20} MB of weights, and "
                f"{by_block.device} has {room >> 20} MB",
                "Pass --set recover.transfer.share=1: all tokens go to transfer, and nothing is distilled.",
            )


def hidden_bytes(job: Job, model: PreTrainedModel, by_block: LayerBlocks | None) -> int:
    """What the hidden states between two blocks take on disk: those that one reads and those that it writes."""
    if by_block is None or not job.train:
        return 0
    tokens = job.recipe.recover.tokens * job.recipe.recover.transfer.share
    width = model.config.get_text_config().hidden_size
    generations = min(2, len(by_block.ranges()) - 1)
    return round(generations * tokens * width * model.dtype.itemsize)


def check_budget(job: Job, length: int, processes: int = 1) -> None:
    """Refuse what no training could do.

    Raises:
        UserError: the tokens do not fill a batch, the batch does not divide among the processes, an adapter or
            heads are wanted of no training, heads look beyond a block, or layers are to be chosen by a measurement
            without text.
    """
    tokens, batch = job.recipe.recover.tokens, length * job.batch_size
    if job.train and tokens < batch:
        raise UserError(
            f"{tokens} tokens are less than one batch of {batch}",
            "Raise --tokens, or lower --batch-size or --seq-len.",
        )
    if job.train and job.batch_size % processes:
        raise UserError(
            f"--batch-size {job.batch_size} does not divide among {processes} processes",
            "It counts the blocks of all processes: use a multiple of their number.",
        )
    if job.medusa_heads and not job.train:
        raise UserError("--no-train trains no Medusa heads", "Leave out --medusa-heads or --no-train.")
    if job.medusa_heads and length < 4 * (job.medusa_heads + 1):
        raise UserError(
            f"blocks of {length} tokens are too short for {job.medusa_heads} Medusa heads",
            f"Pass --seq-len {4 * (job.medusa_heads + 1)} or more, or train fewer heads.",
        )
    if job.keep_adapter and not job.train:
        raise UserError("--no-train makes no adapter to keep", "Leave out --keep-adapter or --no-train.")
    if job.keep_adapter and not job.recipe.recover.distill.lora:
        raise UserError(
            "recover.distill.lora null makes no adapter to keep",
            "Leave out --keep-adapter, or set recover.distill.lora.rank=8.",
        )
    if measured_count(job.keep_softmax) and not (job.train or job.data or job.eval_data):
        raise UserError(
            f"--keep-softmax {job.keep_softmax}: there is no text to measure the layers on",
            "Pass --eval-data or --data, leave out --no-train, or choose the layers with at:i,j,k.",
        )


def check_space(folder: Path, model: PreTrainedModel, hidden_states: int = 0) -> None:
    """Refuse a disk that is too full for the artifact and for what training keeps meanwhile.

    Args:
        folder: the output folder.
        hidden_states: bytes of the hidden states between two blocks of layers.

    Raises:
        UserError: how much is missing.
    """
    need = 2 * sum(p.nbytes for p in model.parameters()) + hidden_states + (64 << 20)
    free = shutil.disk_usage(folder.parent).free
    if free < need:
        part = (
            f" ({hidden_states >> 20} MB of them for hidden states between blocks)" if hidden_states else ""
        )
        raise UserError(
            f"not enough disk space at {folder.parent.resolve().name or folder.parent}: "
            f"{free >> 20} MB are free, about {need >> 20} MB are needed{part}",
            "Free some space, or pass -o DIR on another disk.",
        )
