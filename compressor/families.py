"""What a model family can be pruned by; what is not listed is refused before anything is computed."""

from __future__ import annotations

from ssmc.runtime.errors import UsageError

from .config import CompressConfig
from .patterns import COLUMN, LAYER, PATTERNS, UNSTRUCTURED, Score

_PARTS = {"mamba": PATTERNS, "mamba2": (COLUMN, LAYER)}  # N:M counts as unstructured


def able_parts(config: CompressConfig, model_type: str) -> list[str]:
    """Those parts of a pattern that are carried out for a family."""
    return [part for part in config.parts if part in _PARTS[model_type]]


def check_family(config: CompressConfig, model_type: str) -> None:
    """Refuse what is not carried out, or makes no sense, for this family.

    Raises:
        UsageError: naming what can be used.
    """
    able = _PARTS[model_type]
    wrong = [part for part in config.parts if part not in able and not (config.nm and UNSTRUCTURED in able)]
    if wrong:
        raise UsageError(
            f"The pattern {wrong[0]} is not carried out for {model_type} yet; {', '.join(able)} can be used."
        )
    if model_type != "mamba" and COLUMN in config.parts:
        if config.judge_of(COLUMN) is Score.magnitude:
            raise UsageError(
                f"The score magnitude cannot tell the states of {model_type} apart: a head has one A_log for all of "
                "them. Use another score."
            )
        if config.modules:
            raise UsageError(
                f"The projections of {model_type} are not pruned together with its states yet. Use target ssm."
            )
