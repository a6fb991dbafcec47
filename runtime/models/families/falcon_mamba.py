"""Falcon-Mamba (`model_type: falcon_mamba`), as transformers' FalconMambaForCausalLM holds it.

A Mamba-1 with norms on B, C and dt that have no weights. What a factor on the read-out of the states has to change is
behind the scan, then: y = C h + D u is linear in the read-out, so out_proj takes the factor and D its inverse.
"""

from __future__ import annotations

from collections.abc import Mapping

from ssmc.runtime.later import torch
from ssmc.runtime.models.architectures.capabilities import MAMBA_ALONE, Capabilities
from ssmc.runtime.models.architectures.layouts.stack import Stack
from ssmc.runtime.models.architectures.normed import NormedMamba1


class FalconMambaFamily(Stack, NormedMamba1):
    """Adapter for Falcon-Mamba; see `interface` for what each method promises."""

    model_type = "falcon_mamba"
    capabilities = Capabilities(
        normed_readers=True, gpu_scan=True, gpu_gradients=True, gpu_sums=True, unknown_to=MAMBA_ALONE
    )
    has_norm_weights = False
    behind_norm = ("out_proj.weight", "D")

    def scale_readout(self, weights: Mapping[str, torch.Tensor], factor: float) -> None:
        """Multiply what is read out of the states: out_proj by the factor, D by its inverse."""
        weights["out_proj.weight"].mul_(factor)
        weights["D"].div_(factor)


FAMILY = FalconMambaFamily()
