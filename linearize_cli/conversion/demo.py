"""`demo`: the whole pipeline (convert, evaluate, verify, benchmark) on the small teacher that the package
contains.
"""

from pathlib import Path
from typing import Any

from linearize_cli.conversion.convert import convert
from linearize_cli.data.names import DEMO
from linearize_cli.demo import heldout_path
from linearize_cli.metrics.benchmark import bench
from linearize_cli.metrics.evaluation import evaluate
from linearize_cli.terminal import Terminal
from linearize_cli.verification.verify import verify

WINDOW = 32  # well below the distances of the demo text's repeated words
TOKENS = 600_000
SEQ_LEN = 256
LONGER = 4 * SEQ_LEN  # block length of the evaluation beyond the training length
CONTEXT = 100_000  # context at which memory is compared
TIMED = (SEQ_LEN, 8 * SEQ_LEN)  # contexts of the benchmark
SECONDS = 6.0  # time for its repeats


def demo(
    output: str | Path,
    *,
    tokens: int | None = None,
    resume: bool = False,
    force: bool = False,
    device: str = "auto",
    dtype: str | None = None,
    seed: int = 0,
    terminal: Terminal | None = None,
) -> dict[str, Any]:
    """Convert the embedded teacher, evaluate and verify the artifact, and benchmark both models.

    Args:
        output: the artifact's folder.
        tokens: the number of training tokens. None uses 600,000.
        resume: continue an interrupted run.
        force: replace an existing artifact.

    Returns:
        the report of `convert`, with `eval`, `recall`, `verdict` and `bench` (the results of these commands),
            and `context`, the number of tokens at which memory is compared.
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
