"""`convert`: turn a softmax checkpoint into a linear-attention artifact."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker

from linearize_cli.artifact.load import refuse_linearized
from linearize_cli.conversion.estimate import ASSUMED, measured_flops
from linearize_cli.conversion.layer_selection import measured_count
from linearize_cli.conversion.output import Output, output_folder
from linearize_cli.conversion.pipeline import Place, make_artifact
from linearize_cli.conversion.plan import Memory, planned
from linearize_cli.data.readers import BadRows
from linearize_cli.errors import UserError
from linearize_cli.methods.registry import load_recipe
from linearize_cli.models.device import AUTO, checked_dtype, chosen_device, is_here
from linearize_cli.models.gguf import SUFFIX, split_name
from linearize_cli.terminal import Terminal
from linearize_cli.training.engine import Engine
from linearize_cli.training.job import EVAL_TOKENS, Job
from linearize_cli.training.text import open_sources


def default_output(model: str, method: str) -> Path:
    """Return the default output folder, `MODEL-METHOD` in the working directory. MODEL has no `.gguf`."""
    repo, file = split_name(model)
    name = Path(file or repo).name.removesuffix(SUFFIX)
    method = Path(method).stem if method.endswith((".yaml", ".yml")) else method
    return Path(f"{name or 'model'}-{method.replace(':', '-')}")


def convert(
    model: str,
    output: str | Path | None = None,
    *,
    method: str = "augmented",
    overrides: tuple[str, ...] = (),
    keep_softmax: str | None = None,
    data: tuple[str, ...] = (),
    eval_data: str | None = None,
    eval_tokens: int | None = None,
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
    device: str = "auto",
    dtype: str | None = None,
    memory: int | None = None,
    seed: int = 0,
    tracker: tuple[str | GeneralTracker, ...] = (),
    terminal: Terminal | None = None,
) -> dict[str, Any] | None:
    """Turn a softmax checkpoint into a linear-attention artifact.

    The arguments are those of `linearize convert`. A tracker may also be one of accelerate's trackers. `memory`
    is a number of bytes, or None for what the device has free.

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
        None if dtype == AUTO else dtype,
        seed,
        tuple(overrides),
        eval_tokens or EVAL_TOKENS,
        medusa_heads,
        skip_bad_rows=skip_bad_rows,
    )
    device = chosen_device() if device == AUTO else device
    if processes > 1 and not dry_run:
        raise UserError(
            f"--processes {processes} counts with --dry-run alone",
            f"To run several: accelerate launch --num_processes {processes} -m linearize_cli convert ...",
        )
    if dry_run:
        return plan_report(job, device, memory, trust_remote_code, processes, flops)
    folder = output_folder(default_output(model, method) if output is None else output)
    engine = Engine(chosen_device(device), tracker, folder.parent / "runs")
    terminal = terminal if terminal and engine.main else Terminal(quiet=True)
    output = Output(folder)
    with engine.together():
        report = engine.on_main(output.open, job, resume, force)
        if report is None:
            with engine.only_main(output.working), engine.watched():
                place = Place(folder, output.path, engine, terminal, memory)
                report = make_artifact(job, place, trust_remote_code)
                if engine.main:
                    output.put_in_place(job, report)
    return {**report, "output": str(folder)} if engine.main else None


def plan_report(
    job: Job,
    device: str,
    memory: int | None,
    trust_remote_code: bool,
    processes: int,
    flops: float | None,
) -> dict[str, Any]:
    """Return the plan of a conversion and its estimated costs, from the model's config alone.

    Args:
        job: the run configuration.
        device: the device to plan for. It need not exist on this machine.
        memory: the bytes that the conversion may use. None: what the device has free, or no limit if it is
            not here.
        processes: the number of training processes.
        flops: FLOP/s of one process. None measures it on `device`.
    """
    refuse_linearized(job.model)
    if job.data:
        open_sources(job, BadRows(job.skip_bad_rows))
    known = planned(job, device, processes, Memory.of(memory, device), trust_remote_code, {})
    job, plan, estimate = known.job, known.plan, known.estimate
    count = measured_count(job.keep_softmax)
    if flops is None:
        flops, where = ASSUMED, f"assumed for {device}, which is not here. --flops states it"
        if is_here(device):
            flops = measured_flops(device, checked_dtype(plan.dtype))
            where = f"a matrix product in {plan.dtype}, measured on {device}"
    else:
        where = "as given"
    return {
        "base_model": job.model,
        "method": job.recipe.name,
        "recipe": job.recipe.to_dict(),
        "layers": {
            "linear": [layer.name for layer in known.linear],
            "softmax": {layer.name: layer.refusal or "kept on request" for layer in known.softmax},
        },
        "keep_softmax": f"{count} of the linear layers, chosen by their distance from the teacher"
        if count
        else None,
        "tokens": job.recipe.recover.tokens if job.train else None,
        "seq_len": known.length,
        "batch_size": job.batch_size,
        "parameters": estimate.costs.parameters,
        "processes": processes,
        "plan": plan.to_dict(),
        "plan_line": plan.line(job, known.length),
        "estimate": replace(estimate, flops=flops, source=where).all(),
    }
