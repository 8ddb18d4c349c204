"""`convert`: turn a softmax checkpoint into a linear-attention artifact."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import GeneralTracker
from transformers import PreTrainedModel

from linearize_cli.artifact.load import refuse_linearized
from linearize_cli.checkpoint import check_device, load_shape, load_teacher
from linearize_cli.compatibility import LINEAR, forward_only
from linearize_cli.console import Terminal
from linearize_cli.costs import costs
from linearize_cli.errors import UserError
from linearize_cli.estimate import estimate, measured_flops
from linearize_cli.job import Job, check_output, check_space, partial_folder
from linearize_cli.methods import load_recipe
from linearize_cli.phantom import Phantom
from linearize_cli.pipeline import Run
from linearize_cli.plan import Layer, check_biases, choose_layers, measured_count, plan_layers
from linearize_cli.recipe import Recipe, with_budget
from linearize_cli.recover import data as text
from linearize_cli.recover.engine import Engine
from linearize_cli.recover.layers import KEY, LayerBlocks
from linearize_cli.recover.sample import write_corpus
from linearize_cli.recover.student import recomputable
from linearize_cli.tasks import CausalLM, Task, context_length, task_class, task_of

STEPS, LARGEST = 1000, 8  # of a batch that nobody chose


def default_output(model: str, method: str) -> Path:
    """`./MODEL-METHOD`."""
    method = Path(method).stem if method.endswith((".yaml", ".yml")) else method
    return Path(f"{Path(model).name or 'model'}-{method.replace(':', '-')}")


def convert(
    model: str,
    output: str | Path | None = None,
    *,
    method: str = "augmented",
    overrides: tuple[str, ...] = (),
    keep_softmax: str | None = None,
    data: tuple[str, ...] = (),
    eval_data: str | None = None,
    tokens: int | None = None,
    seq_len: int | None = None,
    batch_size: int | None = None,
    train: bool = True,
    keep_adapter: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    processes: int = 1,
    flops: float | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    device: str = "cpu",
    dtype: str | None = None,
    seed: int = 0,
    tracker: tuple[str | GeneralTracker, ...] = (),
    terminal: Terminal | None = None,
) -> dict[str, Any] | None:
    """Turn a softmax checkpoint into a linear-attention artifact.

    The arguments are those of `linearize convert`; a tracker may also be one of accelerate's own kind. Returns
    the report (the contents of `linearize.json`, and `output`); with `dry_run` the plan and its costs, by
    the model's config alone, and nothing is written.
    Of several processes only the main one returns it, the others None.

    Raises:
        UserError: anything the caller can mend. Nothing half-written is left.
        CheckFailed: the converted model's forms do not agree; nothing is saved.
        KeyboardInterrupt: `<output>.partial` is left for `resume`.
    """
    folder = Path(output).expanduser() if output else default_output(model, method)
    folder = folder if folder.name else folder.resolve()
    recipe = with_budget(load_recipe(method, overrides), tokens)
    if data:
        recipe = with_budget(recipe, data=", ".join(data))
    job = Job(
        model,
        recipe,
        tuple(data),
        eval_data,
        keep_softmax,
        seq_len,
        batch_size,
        train,
        keep_adapter,
        dtype,
        seed,
    )
    if dry_run:
        return plan_report(job, device, trust_remote_code, processes, flops)
    engine = Engine(device, tracker, folder.parent / "runs")
    terminal = terminal if terminal and engine.main else Terminal(quiet=True)
    with engine.together():
        result = run(job, folder, engine, terminal, resume, force, trust_remote_code)
    return result if engine.main else None


def run(
    job: Job,
    folder: Path,
    engine: Engine,
    terminal: Terminal,
    resume: bool,
    force: bool,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """`convert` in one of its processes."""
    recipe, partial = job.recipe, folder.with_name(folder.name + ".partial")
    engine.on_main(check_output, folder, partial, job, resume, force)
    refuse_linearized(job.model)
    sources = open_sources(job)
    eval_text = text.open_source(job.eval_data) if job.eval_data else None
    texts = None if None in sources else train_and_eval(job, sources, eval_text)
    check_device(engine.device)
    size = recipe.recover.transfer.block_layers
    home = "cpu" if size else engine.home
    teacher, tokenizer = load_teacher(job.model, job.dtype, home, trust_remote_code)
    linear, softmax = planned(job, teacher)
    task = task_of(teacher, tokenizer)
    check_task(job, type(teacher).__name__, type(task), linear)
    check_checkpointing(job, teacher)
    length = check_length(job.seq_len, recipe, teacher)
    asked, job = job, with_batch_size(job, length)
    check_budget(job, length, engine.processes)
    by_block = None
    if size:
        by_block = LayerBlocks.of(teacher, [layer.name for layer in linear], size, engine.device)
        check_blocks(job, teacher, by_block, engine)
    engine.on_main(check_space, folder, teacher, hidden_bytes(job, teacher, by_block))
    with engine.only_main(partial_folder, partial, asked, resume), engine.watched():
        if texts is None:
            corpus = partial / "self.jsonl"
            share = -(-recipe.recover.tokens // len(sources))
            engine.on_main(write_corpus, teacher, tokenizer, corpus, share, length, job.seed, terminal)
            sources = [source or text.open_source(str(corpus)) for source in sources]
            texts = train_and_eval(job, sources, eval_text)
        where = (length, partial, terminal, engine, by_block)
        converting = Run(job, teacher, tokenizer, task, linear, softmax, *where)
        report = converting.all(*texts, folder.name)
        if engine.main:
            if folder.exists():
                shutil.rmtree(folder)
            (partial / "artifact").rename(folder)
    if engine.main:
        shutil.rmtree(partial)
    return {**report, "output": str(folder)}


def planned(job: Job, model: PreTrainedModel) -> tuple[list[Layer], list[Layer]]:
    """The layers that become linear, and those that stay softmax. Raises as `choose_layers` and `check_biases`."""
    attention = job.recipe.attention
    reach = attention.local.size if attention.local else 1
    linear, softmax = choose_layers(plan_layers(model, reach, attention.cross == LINEAR), job.keep_softmax)
    check_biases(model, linear, softmax, job.keep_softmax)
    return linear, softmax


def open_sources(job: Job) -> list[text.Source | None]:
    """What the job names as data; None stands for `self`, which is not written yet."""
    names = job.data or ((text.DEMO,) if job.model == text.DEMO else (job.recipe.recover.data,))
    needed = job.train or job.data
    return [None if name == text.SELF else text.open_source(name) for name in names] if needed else []


def train_and_eval(
    job: Job, sources: list[text.Source], eval_text: text.Source | None
) -> tuple[text.Source | None, text.Source | None]:
    """The text to train on and the text to measure on, where there is one."""
    train_text = text.joined(sources) if sources else None
    if train_text is not None and eval_text is None:
        train_text, eval_text = text.hold_out(train_text)
    return train_text if job.train else None, eval_text


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
    if text.SELF in (*job.data, job.recipe.recover.data) and task is not CausalLM:
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
    if text.SELF in job.data:
        raise UserError(
            f"--data self: a model that is on the device {by_block.size} layers at a time writes too slowly",
            f"Pass --data with a file or a dataset, or --set {KEY}=0.",
        )
    if engine.plugin is not None:
        raise UserError(
            f"{KEY} and FSDP are two ways to hold a model that is too large for a device",
            f"Pass --set {KEY}=0, or run without fsdp_config.",
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
        UserError: the tokens do not fill a batch, the batch does not divide among the processes, an adapter is
            wanted of no training, or layers are to be chosen by a measurement without text.
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


def plan_report(
    job: Job, device: str, trust_remote_code: bool, processes: int, flops: float | None
) -> dict[str, Any]:
    """What a conversion would do, and what that takes. Of the model only its config is read.

    Args:
        flops: a second, of one process; None: measured on `device`.
    """
    refuse_linearized(job.model)
    check_device(device)
    if job.data:
        open_sources(job)
    model = load_shape(job.model, job.dtype, trust_remote_code)
    with Phantom():
        linear, softmax = planned(job, model)
    check_task(job, type(model).__name__, task_class(model), linear)
    length = check_length(job.seq_len, job.recipe, model)
    job = with_batch_size(job, length)
    check_budget(job, length, processes)
    count = measured_count(job.keep_softmax)
    report = {
        "base_model": job.model,
        "method": job.recipe.name,
        "recipe": job.recipe.to_dict(),
        "layers": {
            "linear": [layer.name for layer in linear],
            "softmax": {layer.name: layer.refusal or "kept on request" for layer in softmax},
        },
        "keep_softmax": f"{count} of the linear layers, chosen by KL" if count else None,
        "tokens": job.recipe.recover.tokens if job.train else None,
        "seq_len": length,
        "batch_size": job.batch_size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "processes": processes,
    }
    dtype, where = model.dtype, "as given"
    if flops is None:
        name = str(dtype).removeprefix("torch.")
        flops, where = measured_flops(device, dtype), f"a product of matrices in {name}, measured on {device}"
    counted = costs(model, linear, softmax, job.recipe, length)
    lines = estimate(counted, job, length, dtype.itemsize, processes, flops, where)
    return {**report, "estimate": lines}
