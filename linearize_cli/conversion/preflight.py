"""Checks of a conversion before it starts."""

import shutil
from dataclasses import replace
from pathlib import Path

import torch
from linearize_kernels.parts.decay import MEMORIES
from transformers import PreTrainedModel

from linearize_cli.conversion.layer_selection import measured_count
from linearize_cli.data.names import SELF
from linearize_cli.errors import UserError
from linearize_cli.methods.recipe import Recipe
from linearize_cli.models.layer import Layer
from linearize_cli.models.positions import context_length
from linearize_cli.models.task import Task
from linearize_cli.models.tasks import CausalLM
from linearize_cli.training.engine import Engine
from linearize_cli.training.job import EVAL_TOKENS, Job
from linearize_cli.training.streamed_layers import KEY, LayerBlocks
from linearize_cli.training.student import checkpointable

STEPS, LARGEST = 1000, 8  # steps to aim for, and the largest batch, if no batch size is given


def check_length(seq_len: int | None, recipe: Recipe, model: PreTrainedModel) -> int:
    """Return the number of tokens per block: `seq_len`, or by default 1024 or the model's context if that is
    shorter.

    Raises:
        UserError: the blocks, the window or the conv are longer than the model's context.
    """
    limit = context_length(model)
    local, conv = recipe.attention.local, recipe.attention.conv
    for key, size in (("local.size", local.size if local else 0), ("conv.width", conv.width)):
        if size > limit:
            raise UserError(
                f"attention.{key} {size} is longer than the model's context of {limit}",
                f"Use at most {limit}.",
            )
    if seq_len is None:
        return min(1024, limit)
    if seq_len > limit:
        raise UserError(
            f"--seq-len {seq_len} is longer than the model's context of {limit}", f"Use at most {limit}."
        )
    return seq_len


def with_batch_size(job: Job, length: int) -> Job:
    """Return the job with its batch size, in blocks per step. A batch size that is given stays.

    The default is the largest power of 2, up to LARGEST, with which the token budget makes STEPS steps or
    more. With the same number of tokens, more steps recover more quality, up to about STEPS.
    """
    if job.batch_size is not None:
        return job
    rows = job.recipe.recover.tokens // (length * STEPS)
    return replace(job, batch_size=max(1, min(LARGEST, 1 << rows.bit_length() >> 1)))


def with_loss_weights(job: Job, task: type[Task]) -> Job:
    """Return the job with loss weights of distillation that suit the model's task."""
    recover = job.recipe.recover
    distill = task.loss_weights(recover.distill)
    recipe = job.recipe.model_copy(update={"recover": recover.model_copy(update={"distill": distill})})
    return replace(job, recipe=recipe)


def check_task(job: Job, kind: str, task: type[Task], layers: list[Layer]) -> None:
    """Check that a recipe and a job suit the model's task.

    Args:
        kind: the name of the model's class, for messages.
        task: the model's task.
        layers: the layers to convert.

    Raises:
        UserError: the recipe's memory runs forward in time but a layer is bidirectional, the recipe needs
            labels that text does not give, or an option needs another kind of model.
    """
    attention, distill = job.recipe.attention, job.recipe.recover.distill
    if MEMORIES[attention.memory.kind].forward_in_time and not all(layer.causal for layer in layers):
        raise UserError(
            f"attention.memory.kind of {job.recipe.name} runs forward in time, but {kind} is bidirectional",
            "Choose a method without it, or pass --set attention.memory.kind=none.",
        )
    if attention.cross == "linear" and not any("cross" in layer.geometry for layer in layers):
        raise UserError(
            f"attention.cross linear: no layer of {kind} that is converted has cross-attention",
            "Pass --set attention.cross=softmax.",
        )
    if distill.ce and not task.answers:
        raise UserError(
            f"recover.distill.ce {distill.ce:g} needs labels, which text does not give for {kind}",
            "Pass --set recover.distill.ce=0 to train on the teacher's logits alone.",
        )
    for key in ("separate_documents", "assistant_only"):
        if getattr(job.recipe.recover, key) and task is not CausalLM:
            raise UserError(
                f"recover.{key}: {kind} is not a causal language model", f"Pass --set recover.{key}=false."
            )
    if job.medusa_heads and task is not CausalLM:
        raise UserError(
            f"--medusa-heads: {kind} is not a causal language model, so it has no next tokens to draft",
            "Leave the option out.",
        )
    if SELF in (*job.data, job.recipe.recover.data) and task is not CausalLM:
        raise UserError(
            f"--data self: {kind} cannot generate training text", "Pass --data with a file or a dataset."
        )


def check_checkpointing(job: Job, model: PreTrainedModel) -> None:
    """Check that the model supports gradient checkpointing if the recipe requests it.

    Raises:
        UserError: the model does not support it.
    """
    if job.recipe.recover.distill.checkpointing and not checkpointable(model):
        raise UserError(
            f"recover.distill.checkpointing: {type(model).__name__} does not support gradient checkpointing",
            "Leave it off. A smaller --batch-size saves memory too.",
        )


def check_blocks(job: Job, model: PreTrainedModel, by_block: LayerBlocks, engine: Engine) -> None:
    """Check that a conversion can train one block of layers at a time, with the other layers not on the
    device.

    Raises:
        UserError: the model must generate its own text, is sharded, or must be distilled on a device that
            cannot hold it.
    """
    if SELF in (job.data or (job.recipe.recover.data,)):
        raise UserError(
            f"--data self: generation with {by_block.size} layers on the device at a time is too slow",
            f"Pass --data with a file or a dataset, or --set {KEY}=0.",
        )
    if engine.plugin is not None:
        raise UserError(
            f"{KEY} cannot be combined with FSDP: both hold a model that is too large for a device",
            f"Pass --set {KEY}=0, or run without fsdp_config.",
        )
    if job.medusa_heads and job.recipe.recover.transfer.share == 1:
        raise UserError(
            f"--medusa-heads needs the whole model on the device, which {KEY} without distillation avoids",
            "Leave the option out, and run linearize heads ARTIFACT on a device that holds the model.",
        )
    if job.train and job.recipe.recover.transfer.share < 1 and by_block.device.startswith("cuda"):
        need, memory = model.get_memory_footprint(), torch.cuda.mem_get_info(by_block.device)[1]
        if need > memory:
            raise UserError(
                f"distillation needs the whole model on the device: {need >> 20} MB of weights, but "
                f"{by_block.device} has {memory >> 20} MB",
                "Pass --set recover.transfer.share=1 to use all tokens for transfer, without distillation.",
            )


def hidden_bytes(job: Job, model: PreTrainedModel, by_block: LayerBlocks | None) -> int:
    """Return the disk space of the hidden states between two blocks of layers: the files read and the files
    written.

    Return 0 without training, or if all layers are trained at once (`by_block` is None).
    """
    if by_block is None or not job.train:
        return 0
    tokens = job.recipe.recover.tokens * job.recipe.recover.transfer.share
    width = model.config.get_text_config().hidden_size
    generations = min(2, len(by_block.ranges()) - 1)
    return round(generations * tokens * width * model.dtype.itemsize)


def check_budget(job: Job, length: int, processes: int = 1) -> None:
    """Check that the training budget and the options can be used together.

    Args:
        length: the number of tokens per block.
        processes: the number of training processes.

    Raises:
        UserError: the tokens do not fill a batch, the batch cannot be divided among the processes, an adapter
            or heads are requested without training, the blocks are too short for the heads, or `auto:N` has
            no text to measure on.
    """
    tokens, batch = job.recipe.recover.tokens, length * job.batch_size
    if job.train and tokens < batch:
        raise UserError(
            f"{tokens} tokens are less than one batch of {batch} tokens",
            "Raise --tokens, or lower --batch-size or --seq-len.",
        )
    if job.train and job.batch_size % processes:
        raise UserError(
            f"--batch-size {job.batch_size} cannot be divided among {processes} processes",
            "It counts the blocks of all processes. Use a multiple of their number.",
        )
    if job.eval_tokens < min(length, EVAL_TOKENS):
        raise UserError(
            f"--eval-tokens {job.eval_tokens} is less than one block of {length} tokens",
            "Raise it, or lower --seq-len.",
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
    """Check that the disk has enough space for the artifact and for the files of the training.

    Args:
        folder: the output folder.
        hidden_states: the bytes of the hidden states between two blocks of layers.

    Raises:
        UserError: the disk has too little free space.
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
