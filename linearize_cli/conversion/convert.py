"""`convert`: turn a softmax checkpoint into a linear-attention artifact."""

from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker

from linearize_cli.artifact.load import refuse_linearized
from linearize_cli.conversion.costs import costs
from linearize_cli.conversion.estimate import Estimate, measured_flops
from linearize_cli.conversion.layer_selection import measured_count
from linearize_cli.conversion.output import Output, output_folder
from linearize_cli.conversion.phantom import Phantom
from linearize_cli.conversion.pipeline import Place, chosen_layers, make_artifact
from linearize_cli.conversion.preflight import (
    check_budget,
    check_checkpointing,
    check_length,
    check_task,
    with_batch_size,
    with_loss_weights,
)
from linearize_cli.data.readers import BadRows
from linearize_cli.methods.registry import load_recipe
from linearize_cli.models.load import check_device, load_shape
from linearize_cli.models.tasks import task_class
from linearize_cli.terminal import Terminal
from linearize_cli.training.engine import Engine
from linearize_cli.training.job import Job
from linearize_cli.training.text import open_sources


def default_output(model: str, method: str) -> Path:
    """Return the default output folder, `MODEL-METHOD` in the working directory."""
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

    The arguments are those of `linearize convert`. A tracker may also be one of accelerate's trackers.

    Returns:
        the report: the contents of `linearize.json`, and `output`, the artifact's folder. With `dry_run`, the
            plan and its costs, which need only the model's config, and nothing is written. Only the main
            process of a distributed run returns the report. The others return None.

    Raises:
        UserError: the caller can correct the error. No incomplete artifact is left.
        CheckFailed: prefill, decoding or the reloaded model give different logits. Nothing is saved.
        KeyboardInterrupt: the run was interrupted. `<output>.partial` is kept for `resume`.
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
    output = Output(folder)
    with engine.together():
        report = engine.on_main(output.open, job, resume, force)
        if report is None:
            with engine.only_main(output.working), engine.watched():
                report = make_artifact(job, Place(folder, output.path, engine, terminal), trust_remote_code)
                if engine.main:
                    output.put_in_place(job, report)
    return {**report, "output": str(folder)} if engine.main else None


def plan_report(
    job: Job, device: str, trust_remote_code: bool, processes: int, flops: float | None
) -> dict[str, Any]:
    """Return the plan of a conversion and its estimated costs, from the model's config alone.

    Args:
        job: the run configuration.
        device: the device to plan for.
        processes: the number of training processes.
        flops: FLOP/s of one process. None measures it on `device`.
    """
    refuse_linearized(job.model)
    check_device(device)
    if job.data:
        open_sources(job, BadRows(job.skip_bad_rows))
    model = load_shape(job.model, job.dtype, trust_remote_code)
    with Phantom():
        linear, softmax = chosen_layers(job, model)
    job = with_loss_weights(job, task_class(model))
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
        flops, where = measured_flops(device, dtype), f"a matrix product in {name}, measured on {device}"
    rows = -(-job.batch_size // processes)
    counted = costs(model, linear, softmax, job.recipe, length, rows, device)
    lines = Estimate(counted, job, length, dtype.itemsize, processes, flops, where).all()
    return {**report, "estimate": lines}
