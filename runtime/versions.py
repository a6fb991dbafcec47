"""Versions of what a result depends on."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("ssmc", "torch", "transformers", "safetensors", "numba")


def versions() -> dict[str, str]:
    """Installed versions by package; one that is missing is left out."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
