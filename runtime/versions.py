"""Versions of what a result depends on."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("ssmc", "torch", "transformers", "safetensors", "numba")


def versions() -> dict[str, str]:
    """Installed versions by package; one that is missing is left out."""
    found = {"ssmc": import_module(__name__.split(".")[0]).__version__}  # also of a checkout that is not installed
    for package in PACKAGES:
        try:
            found.setdefault(package, version(package))
        except PackageNotFoundError:
            continue
    return found
