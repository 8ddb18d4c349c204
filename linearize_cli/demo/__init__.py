"""The embedded teacher: a tiny Llama-style model and its text, with which `linearize demo` works offline."""

from pathlib import Path


def teacher_path() -> Path:
    """The folder of the embedded model, in Hugging Face format (made by `examples/train_demo_teacher.py`)."""
    return Path(__file__).parent / "teacher"


def heldout_path() -> Path:
    """JSONL of documents that the embedded model has not seen, `{"text": ...}` a line."""
    return Path(__file__).parent / "heldout.jsonl"
