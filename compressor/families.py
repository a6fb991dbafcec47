"""Which patterns a model family can be pruned in; what is not listed is refused before anything is computed."""

from __future__ import annotations

from ssmc.runtime.errors import UsageError

from .config import CompressConfig
from .patterns import LAYER, PATTERNS

_PARTS = {"mamba": PATTERNS, "mamba2": (LAYER,)}  # N:M counts as unstructured


def able_parts(config: CompressConfig, model_type: str) -> list[str]:
    """Those parts of a pattern that are carried out for a family."""
    return [part for part in config.parts if part in _PARTS[model_type]]


def check_family(config: CompressConfig, model_type: str) -> None:
    """Refuse a pattern that is not carried out for this family.

    Raises:
        UsageError: naming the patterns that are.
    """
    able = _PARTS[model_type]
    if wrong := [part for part in config.parts if part not in able and not (config.nm and "unstructured" in able)]:
        raise UsageError(
            f"The pattern {wrong[0]} is not carried out for {model_type} models yet; {', '.join(able)} can be used."
        )
