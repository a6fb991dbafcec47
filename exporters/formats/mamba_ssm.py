"""`--format mamba-ssm`: the layout of mamba_ssm's own models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssmc.exporters.formats.safetensors import Safetensors

if TYPE_CHECKING:
    from ssmc.runtime.models.families import Architecture


class MambaSsm(Safetensors):
    """config.json with `ssm_cfg`, and pytorch_model.bin."""

    name = "mamba-ssm"
    help = "what mamba_ssm reads"
    layout = "mamba-ssm"
    takes_dense = True  # a change of layout alone
    at_once = 4  # one pickle, written at once

    def missing(self, architecture: Architecture) -> str | None:
        """Of Mamba-1 and Mamba-2 only."""
        if architecture.capabilities.mamba_ssm is None:
            return f"mamba_ssm has no models of type {architecture.model_type}"
        return None


MAMBA_SSM = MambaSsm()
