"""`convert`: turn a softmax checkpoint into a linear-attention artifact."""

from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize_cli.artifact.load import refuse_linearized
from linearize_cli.conversion.costs import costs
from linearize_cli.conversion.estimate import Estimate, measured_flops
from linearize_cli.conversion.layer_selection import check_biases, choose_layers, measured_count, plan_layers
from linearize_cli.conversion.output import Output, output_folder
from linearize_cli.conversion.phantom import Phantom
from linearize_cli.conversion.pipeline import Run
from linearize_cli.conversion.preflight import (
    check_blocks,
    check_budget,
    check_checkpointing,
    check_length,
    check_space,
    check_task,
    hidden_bytes,
    with_batch_size,
)
from linearize_cli.data import sources as text
from linearize_cli.data.names import DEMO, SELF
from linearize_cli.data.self_generated import write_corpus
from linearize_cli.methods.registry import load_recipe
from linearize_cli.models.layer import Layer
from linearize_cli.models.load import check_device, load_shape, load_teacher
from linearize_cli.models.tasks import Task, task_class, task_of
from linearize_cli.terminal import Terminal
from linearize_cli.training.engine import Engine
from linearize_cli.training.job import Job
from linearize_cli.training.streamed_layers import LayerBlocks


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
    skip_bad_rows: int = 0,
    tokens: int | None = None,
    seq_len: int | None = None,
    batch_size: int | None = None,
    train: bool = True,
    medusa_heads: int = 0,
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
    recipe = load_recipe(method, overrides, trust_remote_code).with_budget(tokens, ", ".join(data))
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
        medusa_heads,
        skip_bad_rows=skip_bad_rows,
    )
    if dry_run:
        return plan_report(job, device, trust_remote_code, processes, flops)
    folder = output_folder(default_output(model, method) if output is None else output)
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
    """Run `convert` in one of its processes."""
    output = Output(folder)
    report = engine.on_main(output.open, job, resume, force)
    if report is None:
        with engine.only_main(output.working), engine.watched():
            report = make_artifact(job, output.path, folder, engine, terminal, trust_remote_code)
            if engine.main:
                output.put_in_place(job, report)
    return {**report, "output": str(folder)}


def make_artifact(
    job: Job, partial: Path, folder: Path, engine: Engine, terminal: Terminal, trust_remote_code: bool
) -> dict[str, Any]:
    """Write the artifact to `partial/artifact` and return its report.

    Args:
        folder: where the artifact will be.
    """
    refuse_linearized(job.model)
    bad = text.BadRows(job.skip_bad_rows)
    sources = open_sources(job, bad)
    eval_text = text.open_source(job.eval_data, bad) if job.eval_data else None
    texts = None if None in sources else train_and_eval(job, sources, eval_text)
    check_device(engine.device)
    size = job.recipe.recover.transfer.block_layers
    home = "cpu" if size else engine.home
    teacher, tokenizer = load_teacher(job.model, job.dtype, home, trust_remote_code)
    linear, softmax = planned(job, teacher)
    task = task_of(teacher, tokenizer)
    check_task(job, type(teacher).__name__, type(task), linear)
    read_through([*sources, eval_text], tokenizer, task)
    bad.report(terminal)
    check_checkpointing(job, teacher)
    length = check_length(job.seq_len, job.recipe, teacher)
    job = with_batch_size(job, length)
    check_budget(job, length, engine.processes)
    by_block = None
    if size:
        by_block = LayerBlocks.of(teacher, [layer.name for layer in linear], size, engine.device)
        check_blocks(job, teacher, by_block, engine)
    engine.on_main(check_space, folder, teacher, hidden_bytes(job, teacher, by_block))
    if texts is None:
        writing = (teacher, tokenizer, partial / "self.jsonl")
        sources = with_own_text(job, sources, bad, *writing, length, terminal, engine)
        texts = train_and_eval(job, sources, eval_text)
    where = (length, partial, terminal, engine, by_block)
    converting = Run(job, teacher, tokenizer, task, linear, softmax, *where)
    report = converting.all(*texts, folder.name)
    bad.report(terminal)
    return report


def planned(job: Job, model: PreTrainedModel) -> tuple[list[Layer], list[Layer]]:
    """The layers that become linear, and those that stay softmax. Raises as `choose_layers` and `check_biases`."""
    attention = job.recipe.attention
    reach = attention.local.size if attention.local else 1
    linear, softmax = choose_layers(plan_layers(model, reach, attention.cross == "linear"), job.keep_softmax)
    check_biases(model, linear, softmax, job.keep_softmax)
    return linear, softmax


def open_sources(job: Job, bad: text.BadRows) -> list[text.Source | None]:
    """What the job names as data; None stands for `self`, which is not written yet."""
    names = job.data or ((DEMO,) if job.model == DEMO else (job.recipe.recover.data,))
    needed = job.train or job.data
    return [None if name == SELF else text.open_source(name, bad) for name in names] if needed else []


def read_through(sources: list[text.Source | None], tokenizer: PreTrainedTokenizerBase, task: Task) -> None:
    """Read local text once before the start. Raises as `text.read_through`."""
    for source in filter(None, sources):
        text.read_through(source, tokenizer, task)


def with_own_text(
    job: Job,
    sources: list[text.Source | None],
    bad: text.BadRows,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Path,
    length: int,
    terminal: Terminal,
    engine: Engine,
) -> list[text.Source]:
    """The sources with what the model writes into `corpus`, its share of the budget, where one is `self`."""
    if None in sources:
        share = -(-job.recipe.recover.tokens // len(sources))
        engine.on_main(write_corpus, model, tokenizer, corpus, share, length, job.seed, terminal)
    return [source or text.open_source(str(corpus), bad) for source in sources]


def train_and_eval(
    job: Job, sources: list[text.Source], eval_text: text.Source | None
) -> tuple[text.Source | None, text.Source | None]:
    """The text to train on and the text to measure on, where there is one."""
    train_text = text.joined(sources) if sources else None
    if train_text is not None and eval_text is None:
        train_text, eval_text = text.hold_out(train_text)
    return train_text if job.train else None, eval_text


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
        open_sources(job, text.BadRows(job.skip_bad_rows))
    model = load_shape(job.model, job.dtype, trust_remote_code)
    with Phantom():
        linear, softmax = planned(job, model)
    check_task(job, type(model).__name__, task_class(model), linear)
    check_checkpointing(job, model)
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
    lines = Estimate(counted, job, length, dtype.itemsize, processes, flops, where).all()
    return {**report, "estimate": lines}
