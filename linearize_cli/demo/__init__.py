"""The embedded teacher, a tiny Llama-style model with its text, which lets `linearize demo` work offline."""

from pathlib import Path


def teacher_path() -> Path:
    """Return the folder of the embedded model. `examples/train_demo_teacher.py` made it."""
    return Path(__file__).parent / "teacher"


def heldout_path() -> Path:
    """Return the JSONL file of documents that the embedded model was not trained on."""
    return Path(__file__).parent / "heldout.jsonl"
