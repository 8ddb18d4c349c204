"""Which software made a report."""

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("linearize-cli", "torch", "transformers", "peft", "safetensors")


def versions() -> dict[str, str]:
    """Package -> version, and Python's."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
