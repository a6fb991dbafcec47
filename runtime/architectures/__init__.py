"""The model families ssmc knows, one file each, named after its transformers `model_type`."""

from __future__ import annotations

from ..errors import CheckpointError
from .base import Architecture, Cut, Dimensions, Readers
from .mamba import MambaArchitecture
from .mamba2 import Mamba2Architecture

__all__ = ["ARCHITECTURES", "Architecture", "Cut", "Dimensions", "Readers", "architecture_for"]

ARCHITECTURES: dict[str, Architecture] = {a.model_type: a for a in (MambaArchitecture(), Mamba2Architecture())}


def architecture_for(model_type: str | None, where: str = "this model") -> Architecture:
    """The adapter of a family.

    Args:
        model_type: as in a transformers config.json.
        where: what to call the model in the error.

    Raises:
        CheckpointError: no adapter knows this family.
    """
    if model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    known = ", ".join(sorted(ARCHITECTURES))
    raise CheckpointError(
        f"{where} is not a model ssmc can compress: its config.json says model_type {model_type!r}, "
        f"ssmc knows {known}. Point it at a Mamba checkpoint."
    )
