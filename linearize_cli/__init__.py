"""linearize: turn a softmax checkpoint into a linear-attention model.

The functions in `__all__` are imported on first use, so that the command line answers at once.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
_API = {
    "convert": "linearize_cli.conversion.convert",
    "load": "linearize_cli.artifact.load",
    "evaluate": "linearize_cli.metrics.evaluation",
    "verify": "linearize_cli.verification.verify",
    "bench": "linearize_cli.metrics.benchmark",
    "report": "linearize_cli.pages.page",
    "compare": "linearize_cli.pages.compare",
    "push": "linearize_cli.publish.push",
}
__all__ = list(_API)


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_API[name]), name)
