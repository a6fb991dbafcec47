"""Granite 4 (`model_type: granitemoehybrid`), as transformers' GraniteMoeHybridForCausalLM holds it.

Mamba-2 layers among layers of attention, each with an MLP and, in some models, a mixture of experts behind its mixer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ssmc.runtime.later import torch
from ssmc.runtime.models.architectures.capabilities import Otherwise
from ssmc.runtime.models.architectures.experts import GATED_MAPS, ExpertNeurons, Experts, experts_plan
from ssmc.runtime.models.architectures.mamba2_hybrid import Mamba2Hybrid
from ssmc.runtime.models.architectures.units import FUSED, MLP, Attention, Part, Writer, attends_in_4

# What follows "block_sparse_moe." in the names of files and of the model; transformers' own mapping for this family.
_NAMES = {
    "input_linear.weight": "experts.gate_up_proj",
    "output_linear.weight": "experts.down_proj",
    "router.layer.weight": "router.weight",
}


class GraniteMoeHybridFamily(Mamba2Hybrid):
    """Adapter for Granite 4; see `interface` for what each method promises."""

    model_type = "granitemoehybrid"
    mixer_name = "mamba"
    final_norm = "norm"
    units = (
        Part(MLP, "shared_mlp", FUSED, "output_linear", "shared_intermediate_size"),
        Attention(),
        Experts(name="block_sparse_moe", plan=experts_plan(GATED_MAPS, "router")),
        ExpertNeurons(name="block_sparse_moe", plan=experts_plan(GATED_MAPS, "router"), size="intermediate_size"),
    )
    writers = tuple(
        Writer(name, stage, "residual_multiplier")
        for name, stage in (
            *(("mamba.out_proj", 0), ("self_attn.o_proj", 0)),
            *(("shared_mlp.output_linear", 1), ("block_sparse_moe.experts", 1)),
        )
    )
    middle = "post_attention_layernorm"

    def otherwise(self, config: Any) -> Sequence[Otherwise]:
        """transformers 4.57 has no width of heads in the configuration."""
        return [*super().otherwise(config), *attends_in_4(config)]

    def keep_layers(self, config: Any, kept: Sequence[int]) -> None:
        """There is a list of kinds beside the number."""
        config.layer_types = [config.layer_types[layer] for layer in kept]
        super().keep_layers(config, kept)

    def from_stored(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors by the model's names from those by the names they are stored under."""
        return _renamed(tensors, _NAMES)

    def to_stored(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors by the names they are stored under from those by the model's names."""
        return _renamed(tensors, {new: old for old, new in _NAMES.items()})


def _renamed(tensors: dict[str, torch.Tensor], names: dict[str, str]) -> dict[str, torch.Tensor]:
    out = {}
    for key, tensor in tensors.items():
        prefix, found, rest = key.partition(".block_sparse_moe.")
        out[prefix + found + names.get(rest, rest) if found else key] = tensor
    return out


FAMILY = GraniteMoeHybridFamily()
