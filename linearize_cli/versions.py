"""The software versions that reports record."""

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("linearize-cli", "torch", "transformers", "peft", "safetensors")


def versions(*more: str) -> dict[str, str]:
    """Return the versions of Python, of PACKAGES and of `more` packages. A package that is not installed is
    missing.
    """
    found = {"python": platform.python_version()}
    for package in (*PACKAGES, *more):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
