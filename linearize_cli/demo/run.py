"""`demo`: the whole pipeline on the embedded teacher."""

from pathlib import Path
from typing import Any

from linearize_cli.artifact.load import load
from linearize_cli.checkpoint import load_teacher
from linearize_cli.console import Terminal
from linearize_cli.conversion import convert
from linearize_cli.demo import heldout_path
from linearize_cli.demo.corpus import HELDOUT_SEED, generate_documents
from linearize_cli.measure.recall import recall
from linearize_cli.recover.data import DEMO
from linearize_cli.verification import verify

WINDOW = 32  # well below the distances over which the demo's text must be recalled
TOKENS = 600_000
SEQ_LEN = 256
CONTEXT = 100_000
DOCUMENTS = 100


def demo(
    output: str | Path,
    *,
    tokens: int | None = None,
    force: bool = False,
    device: str = "cpu",
    dtype: str | None = None,
    seed: int = 0,
    terminal: Terminal | None = None,
) -> dict[str, Any]:
    """Convert the embedded teacher, measure recall beyond the window, and verify the artifact.

    Returns the report of `convert`, with `recall: {teacher, student}`, `verdict` and the `context` that
    memory is compared at.
    """
    terminal = terminal or Terminal(quiet=True)
    report = convert(
        DEMO,
        output,
        overrides=(f"attention.local.size={WINDOW}",),
        eval_data=str(heldout_path()),
        tokens=tokens or TOKENS,
        seq_len=SEQ_LEN,
        force=force,
        device=device,
        dtype=dtype,
        seed=seed,
        terminal=terminal,
    )
    documents = list(generate_documents(HELDOUT_SEED, DOCUMENTS))
    pairs = {
        "teacher": load_teacher(DEMO, dtype, device),
        "student": load(output, device=device, dtype=dtype),
    }
    accuracy = {name: recall(*pair, documents)["accuracy"] for name, pair in pairs.items()}
    verdict = verify(output, device=device, dtype=dtype, seed=seed)["verdict"]
    return {**report, "recall": accuracy, "verdict": verdict, "context": CONTEXT}
