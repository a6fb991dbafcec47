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

    def missing(self, architecture: Architecture) -> str | None:
        """Of Mamba-1 and Mamba-2 only."""
        from ssmc.runtime.models.checkpoints import has_layout_of

        model_type = architecture.model_type
        return None if has_layout_of(model_type) else f"mamba_ssm has no models of type {model_type}"


MAMBA_SSM = MambaSsm()
