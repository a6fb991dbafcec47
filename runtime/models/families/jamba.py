"""Jamba (`model_type: jamba`), as transformers' JambaForCausalLM holds it: Mamba-1 layers among layers of attention.

Every block has an MLP, or a mixture of them, behind its mixer. B, C and dt of a Mamba layer pass norms with weights,
which take a factor on the read-out of the states.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ssmc.runtime.models.families.base import HybridDimensions
from ssmc.runtime.models.families.hybrid import HybridArchitecture
from ssmc.runtime.models.families.normed import NormedMambaArchitecture


class JambaArchitecture(HybridArchitecture, NormedMambaArchitecture):
    """Adapter for Jamba; see `Architecture` for what each method promises."""

    model_type = "jamba"
    has_norm_weights = True
    by_state = ("b_layernorm.weight", "c_layernorm.weight")
    behind_norm = ("b_layernorm.weight",)
    state_field = "mamba_d_state"
    final_norm = "final_layernorm"
    experts = (
        ("experts.*.gate_proj.weight|experts.*.up_proj.weight", "experts.gate_up_proj"),
        ("experts.*.down_proj.weight", "experts.down_proj"),
    )

    def dimensions(self, config: Any) -> HybridDimensions:
        """Read the sizes out of a transformers configuration."""
        return HybridDimensions(
            n_layer=config.num_hidden_layers,
            d_model=config.hidden_size,
            d_inner=config.mamba_expand * config.hidden_size,
            d_state=config.mamba_d_state,
            dt_rank=config.mamba_dt_rank,
            d_conv=config.mamba_d_conv,
            vocab_size=config.vocab_size,
            mamba_layers=config.layers_block_type.count("mamba"),
        )

    def scale_readout(self, weights: Mapping[str, torch.Tensor], factor: float) -> None:
        """Multiply what is read out of the states: the weights of B's norm take the factor."""
        weights["b_layernorm.weight"].mul_(factor)
