"""The model families ssmc knows, one file each, named after its transformers `model_type`."""

from __future__ import annotations

from ssmc.runtime.errors import CheckpointError
from ssmc.runtime.models.families.bamba import BambaArchitecture
from ssmc.runtime.models.families.base import Architecture, Cut, Dimensions, Readers
from ssmc.runtime.models.families.falcon_h1 import FalconH1Architecture
from ssmc.runtime.models.families.falcon_mamba import FalconMambaArchitecture
from ssmc.runtime.models.families.granitemoehybrid import GraniteMoeHybridArchitecture
from ssmc.runtime.models.families.jamba import JambaArchitecture
from ssmc.runtime.models.families.mamba import MambaArchitecture
from ssmc.runtime.models.families.mamba2 import Mamba2Architecture
from ssmc.runtime.models.families.nemotron_h import NemotronHArchitecture
from ssmc.runtime.models.families.zamba2 import Zamba2Architecture

__all__ = ["ARCHITECTURES", "Architecture", "Cut", "Dimensions", "Readers", "architecture_for"]

_ALL = (
    MambaArchitecture(),
    Mamba2Architecture(),
    FalconMambaArchitecture(),
    JambaArchitecture(),
    BambaArchitecture(),
    GraniteMoeHybridArchitecture(),
    FalconH1Architecture(),
    NemotronHArchitecture(),
    Zamba2Architecture(),
)
ARCHITECTURES: dict[str, Architecture] = {architecture.model_type: architecture for architecture in _ALL}


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
