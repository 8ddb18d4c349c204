"""`demo`: the whole pipeline on the embedded teacher."""

from pathlib import Path
from typing import Any

from linearize_cli.conversion.convert import convert
from linearize_cli.data.names import DEMO
from linearize_cli.demo import heldout_path
from linearize_cli.metrics.benchmark import bench
from linearize_cli.metrics.evaluation import evaluate
from linearize_cli.terminal import Terminal
from linearize_cli.verification.verify import verify

WINDOW = 32  # well below the distances over which the demo's text must be recalled
TOKENS = 600_000
SEQ_LEN = 256
LONGER = 4 * SEQ_LEN  # the length of blocks that show what lies beyond
CONTEXT = 100_000
TIMED = (SEQ_LEN, 8 * SEQ_LEN)  # contexts of the benchmark
SECONDS = 6.0  # for its repeats


def demo(
    output: str | Path,
    *,
    tokens: int | None = None,
    resume: bool = False,
    force: bool = False,
    device: str = "cpu",
    dtype: str | None = None,
    seed: int = 0,
    terminal: Terminal | None = None,
) -> dict[str, Any]:
    """Convert the embedded teacher, measure the artifact beside it, verify it, and time both.

    Returns the report of `convert`, with that of `eval` and its `recall`, `verdict`, that of `bench` and the
    `context` that memory is compared at.
    """
    terminal = terminal or Terminal(quiet=True)
    report = convert(
        DEMO,
        output,
        overrides=(f"attention.local.size={WINDOW}",),
        eval_data=str(heldout_path()),
        tokens=tokens or TOKENS,
        seq_len=SEQ_LEN,
        resume=resume,
        force=force,
        device=device,
        dtype=dtype,
        seed=seed,
        terminal=terminal,
    )
    common = dict(device=device, dtype=dtype, seed=seed)
    measured = evaluate(output, context=(SEQ_LEN, LONGER), **common)
    verdict = verify(output, quick=True, **common)["verdict"]
    timed = bench(output, context=TIMED, seconds=SECONDS, **common)
    return {
        **report,
        "recall": measured["recall"],
        "eval": measured,
        "verdict": verdict,
        "bench": timed,
        "context": CONTEXT,
    }
