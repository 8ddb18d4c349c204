"""The check of a GPU in one command: imports, correctness, then the speed of a layer and of a whole model."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import click

ROOT = Path(__file__).parents[1]
FACTS = """
import json, torch, transformers, triton
from linearize_kernels.triton.tuning import limit
import linearize_cli.runtime
device = "cuda" if torch.cuda.is_available() else "cpu"
x = torch.zeros(1, 2, 64, 64, device=device)
found = {package.__name__: package.__version__ for package in (torch, triton, transformers)}
found["limit"] = limit(x, x, x)
if device == "cuda":
    found |= dict(gpu=torch.cuda.get_device_name(), capability=torch.cuda.get_device_capability())
print(json.dumps(found))
"""
TESTS = "tests/kernels/test_triton.py tests/kernels/test_gpu.py"
ATTENTION, MODEL = "benchmarks/attention.py", "benchmarks/model.py"
# Each step: its name, its command, and the most seconds it may take. All together stay below 9 minutes.
STEPS = (
    ("imports", f"-c {shlex.quote(FACTS)}", 60),
    ("correctness", f"-m pytest -q -rs -m gpu {TESTS}", 200),
    ("attention", f"{ATTENTION} --context 4k,32k --heads 32 --head-dim 128 --seconds 3", 120),
    ("model", f"{MODEL} --context 2k,32k --nodes 16 --layers 8 --seconds 3", 150),
)
# The same on a CPU, with Triton's interpreter and tiny sizes, to find errors of the check itself.
REHEARSED = {
    "correctness": "-m pytest -q -rs tests/kernels/test_gpu.py tests/kernels/test_trial.py",
    "attention": f"{ATTENTION} --context 64 --heads 1 --head-dim 16 --seconds 0",
    "model": f"{MODEL} --context 32 --nodes 2 --layers 1 --hidden 32 --heads 2 --intermediate 32 --vocab 50 "
    "--dtype float32 --device cpu --seconds 0",
}


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="gpu-check",
    show_default=True,
    help="Folder for the results.",
)
@click.option("--rehearse", is_flag=True, help="Run on the CPU, in Triton's interpreter, with tiny sizes.")
def main(out: Path, rehearse: bool) -> None:
    """Check linearize on this machine's GPU, in less than 9 minutes.

    The steps run one after the other: imports, correctness (compiled kernels against the reference in fp64), and the
    speed of a layer and of a model against softmax attention. A step's output is in OUT/STEP.txt as it is printed, and
    OUT/summary.json is written after each step. A step that fails does not end the check. The exit code is 1 if one
    failed.
    """
    out.mkdir(parents=True, exist_ok=True)
    summary = {}
    for name, command, limit in STEPS:
        words = shlex.split(REHEARSED.get(name, command) if rehearse else command)
        if words[0] in (ATTENTION, MODEL):
            words += ["--out", str(out.resolve())]
        summary[name] = run(words, out / f"{name}.txt", limit, rehearse)
        click.echo(f"{name}: {summary[name]['ended']} in {summary[name]['seconds']:.0f} s")
        (out / "summary.json").write_text(json.dumps(summary, indent=2))
    sys.exit(any(step["ended"] != "passed" for step in summary.values()))


def run(command: list[str], output: Path, limit: int, rehearse: bool) -> dict:
    """Run a Python command from the project's folder, with its output in a file.

    Args:
        command: the arguments of Python.
        output: the file for all that it prints.
        limit: seconds after which it is ended.
        rehearse: True to run kernels in Triton's interpreter.

    Returns:
        `ended` ("passed", "failed" or "out of time"), `seconds`, and `last`, the last line that it printed.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    if rehearse:
        environment["TRITON_INTERPRET"] = "1"
    started = time.monotonic()
    with output.open("w") as file:
        try:
            code = subprocess.run(
                [sys.executable, *command], cwd=ROOT, env=environment, stdout=file, stderr=file, timeout=limit
            ).returncode
            ended = "failed" if code else "passed"
        except subprocess.TimeoutExpired:
            ended = "out of time"
    lines = output.read_text().strip().splitlines()
    return {"ended": ended, "seconds": time.monotonic() - started, "last": lines[-1] if lines else ""}


if __name__ == "__main__":
    main()
