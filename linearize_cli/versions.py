"""Which software made a report."""

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("linearize-cli", "torch", "transformers", "peft", "safetensors")


def versions(*more: str) -> dict[str, str]:
    """Package -> version, of these packages too, and Python's."""
    found = {"python": platform.python_version()}
    for package in (*PACKAGES, *more):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
