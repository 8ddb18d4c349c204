"""`convert`: turn a softmax checkpoint into a linear-attention artifact."""

import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from linearize_cli.artifact.load import refuse_linearized
from linearize_cli.checkpoint import load_teacher
from linearize_cli.compatibility import LINEAR, forward_only
from linearize_cli.console import Terminal
from linearize_cli.errors import UserError
from linearize_cli.job import Job, check_output, check_space, partial_folder
from linearize_cli.methods import load_recipe
from linearize_cli.pipeline import Run
from linearize_cli.plan import Layer, check_biases, choose_layers, measured_count, plan_layers
from linearize_cli.recipe import Recipe, with_budget
from linearize_cli.recover import data as text
from linearize_cli.recover.sample import write_corpus
from linearize_cli.tasks import CausalLM, Task, context_length, task_of


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
    batch_size: int = 8,
    train: bool = True,
    keep_adapter: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    force: bool = False,
    trust_remote_code: bool = False,
    device: str = "cpu",
    dtype: str | None = None,
    seed: int = 0,
    terminal: Terminal | None = None,
) -> dict[str, Any]:
    """Turn a softmax checkpoint into a linear-attention artifact.

    The arguments are those of `linearize convert`. Returns the report (the contents of `linearize.json`, and
    `output`); with `dry_run` the plan, and nothing is written.

    Raises:
        UserError: anything the caller can mend. Nothing half-written is left.
        CheckFailed: the converted model's forms do not agree; nothing is saved.
        KeyboardInterrupt: `<output>.partial` is left for `resume`.
    """
    terminal = terminal or Terminal(quiet=True)
    recipe = with_budget(load_recipe(method, overrides), tokens)
    if data:
        recipe = with_budget(recipe, data=", ".join(data))
    folder = Path(output).expanduser() if output else default_output(model, method)
    folder = folder if folder.name else folder.resolve()
    partial = folder.with_name(folder.name + ".partial")
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
    if not dry_run:
        check_output(folder, partial, job, resume, force)
    refuse_linearized(model)
    sources = open_sources(job)
    eval_text = text.open_source(eval_data) if eval_data else None
    texts = None if None in sources else train_and_eval(job, sources, eval_text)
    teacher, tokenizer = load_teacher(model, dtype, device, trust_remote_code)
    reach = recipe.attention.local.size if recipe.attention.local else 1
    linear, softmax = choose_layers(
        plan_layers(teacher, reach, recipe.attention.cross == LINEAR), keep_softmax
    )
    check_biases(teacher, linear, softmax, keep_softmax)
    task = task_of(teacher, tokenizer)
    check_task(job, task, linear)
    length = check_length(seq_len, recipe, teacher)
    check_budget(job, length)
    if dry_run:
        return plan_report(job, teacher, linear, softmax, length)
    check_space(folder, teacher)
    with partial_folder(partial, job, resume):
        if texts is None:
            corpus = partial / "self.jsonl"
            share = -(-recipe.recover.tokens // len(sources))
            write_corpus(teacher, tokenizer, corpus, share, length, seed, terminal)
            sources = [source or text.open_source(str(corpus)) for source in sources]
            texts = train_and_eval(job, sources, eval_text)
        run = Run(job, teacher, tokenizer, task, linear, softmax, length, partial, terminal)
        report = run.all(*texts, folder.name)
        if folder.exists():
            shutil.rmtree(folder)
        (partial / "artifact").rename(folder)
    shutil.rmtree(partial)
    return {**report, "output": str(folder)}


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


def check_task(job: Job, task: Task, layers: list[Layer]) -> None:
    """Refuse what this kind of model cannot do.

    Raises:
        UserError: a memory that runs forward in time for layers that see both sides, answers that text does not
            hold, or text that the model cannot write.
    """
    key, distill = forward_only(job.recipe.attention), job.recipe.recover.distill
    if key is not None and not all(layer.causal for layer in layers):
        raise UserError(
            f"{key} of {job.recipe.name} runs forward in time, and {task.kind} attends to both sides",
            "Choose a method without it, or pass --set attention.memory.kind=none.",
        )
    if job.recipe.attention.cross == LINEAR and not any("cross" in layer.geometry for layer in layers):
        raise UserError(
            f"attention.cross linear: no layer of {task.kind} to convert attends to an encoder",
            "Pass --set attention.cross=softmax.",
        )
    if distill.ce and not task.answers:
        raise UserError(
            f"recover.distill.ce {distill.ce:g} needs right answers, and text holds none for {task.kind}",
            "Pass --set recover.distill.ce=0: it learns the teacher's logits.",
        )
    for key in ("separate_documents", "assistant_only"):
        if getattr(job.recipe.recover, key) and not isinstance(task, CausalLM):
            raise UserError(
                f"recover.{key}: {task.kind} is no causal language model", f"Pass --set recover.{key}=false."
            )
    if text.SELF in (*job.data, job.recipe.recover.data) and not isinstance(task, CausalLM):
        raise UserError(
            f"--data self: {task.kind} writes no text to learn from", "Pass --data with a file or a dataset."
        )


def check_budget(job: Job, length: int) -> None:
    """Refuse what no training could do.

    Raises:
        UserError: the tokens do not fill a batch, an adapter is wanted of no training, or layers are to be
            chosen by a measurement without text.
    """
    tokens, batch = job.recipe.recover.tokens, length * job.batch_size
    if job.train and tokens < batch:
        raise UserError(
            f"{tokens} tokens are less than one batch of {batch}",
            "Raise --tokens, or lower --batch-size or --seq-len.",
        )
    if job.keep_adapter and not job.train:
        raise UserError("--no-train makes no adapter to keep", "Leave out --keep-adapter or --no-train.")
    if measured_count(job.keep_softmax) and not (job.train or job.data or job.eval_data):
        raise UserError(
            f"--keep-softmax {job.keep_softmax}: there is no text to measure the layers on",
            "Pass --eval-data or --data, leave out --no-train, or choose the layers with at:i,j,k.",
        )


def plan_report(
    job: Job, model: PreTrainedModel, linear: list[Layer], softmax: list[Layer], length: int
) -> dict[str, Any]:
    """What a conversion would do."""
    count = measured_count(job.keep_softmax)
    return {
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
    }
