"""Nemotron-H (`model_type: nemotron_h`), as transformers' NemotronHForCausalLM holds it.

A block is a norm and one of: a Mamba-2 mixer, attention, an MLP, a mixture of experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ssmc.runtime.later import nn, torch
from ssmc.runtime.models.architectures.capabilities import Otherwise
from ssmc.runtime.models.architectures.experts import PLAIN_MAPS, ExpertNeurons, Experts, experts_plan
from ssmc.runtime.models.architectures.mamba2_hybrid import CAPABILITIES, Fields, Mamba2Hybrid
from ssmc.runtime.models.architectures.units import GATED, MLP, Attention, Part, Writer

_LATENT = {"before": "fc1_latent_proj", "behind": "fc2_latent_proj"}
_EXPERTS: dict[str, Any] = {
    **{"name": "mixer", "router": "gate", "plan": experts_plan(PLAIN_MAPS, "gate", **_LATENT), "of_layers": "moe"},
    **_LATENT,
}
_NOT_LOADED = "mtp."  # of a head that predicts more tokens, which transformers leaves out
_STORED, _PREFIX = "backbone.", "model."


class NemotronHFamily(Mamba2Hybrid):
    """Adapter for Nemotron-H; see `interface` for what each method promises."""

    model_type = "nemotron_h"
    capabilities = replace(CAPABILITIES, free_width=True)
    embedding = "model.embeddings.weight"
    without_limits = ("llama.cpp", "mlx-lm", "vllm")
    mixer_name = "mixer"
    norm_name = "norm"
    final_norm = "norm_f"
    experts = (("experts.*.up_proj.weight", "experts.up_proj"), ("experts.*.down_proj.weight", "experts.down_proj"))
    units = (
        Part(MLP, "mixer", GATED, "down_proj", "intermediate_size", of_layers="mlp"),
        Part(MLP, "mixer.shared_experts", GATED, "down_proj", "moe_shared_expert_intermediate_size", of_layers="moe"),
        Attention(name="mixer", of_layers="full_attention"),
        Experts(**_EXPERTS, groups_field="n_group", groups_taken="topk_group"),
        ExpertNeurons(**_EXPERTS, size="moe_intermediate_size"),
    )
    writers = tuple(
        Writer(f"mixer.{name}")
        for name in ("out_proj", "o_proj", "down_proj", "shared_experts.down_proj", "fc2_latent_proj", "experts")
    )
    state_field = "ssm_state_size"
    fields = Fields("mamba_num_heads", "mamba_head_dim", "n_groups", "conv_kernel")

    def time_step_limits(self, config: Any) -> tuple[float, float]:
        """transformers takes `time_step_min` for the least time step, whatever `time_step_limit` says."""
        return config.time_step_min, math.inf

    def otherwise(self, config: Any) -> Sequence[Otherwise]:
        """transformers has the family since release 5; before, a checkpoint's own code had it."""
        what = (
            "its release 4.57 has no models of this family and runs one only by the code that lies beside it "
            "(trust_remote_code), which needs mamba_ssm; release 5 has them"
        )
        return [*super().otherwise(config), Otherwise("transformers", what, release="4.57", refused=True)]

    def width(self, config: Any) -> int:
        """d_inner of the mixers."""
        return config.mamba_num_heads * config.mamba_head_dim

    def keep_layers(self, config: Any, kept: Sequence[int]) -> None:
        """The list of kinds says how many there are."""
        config.layers_block_type = [config.layers_block_type[layer] for layer in kept]

    def set_width(self, config: Any, d_inner: int) -> None:
        """The numbers of heads and of their channels say it."""

    def mixer(self, block: nn.Module) -> nn.Module | None:
        """The state-space mixer inside a block; None in one of another kind, whose mixer is something else."""
        return block.mixer if block.block_type == "linear_attention" else None

    def from_stored(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors by the model's names from those by the names they are stored under."""
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(_NOT_LOADED)}
        own = {_PREFIX + n.removeprefix(_STORED) if n.startswith(_STORED) else n: t for n, t in tensors.items()}
        return super().from_stored(own)

    def to_stored(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors by the names they are stored under from those by the model's names."""
        tensors = super().to_stored(tensors)
        return {_STORED + n.removeprefix(_PREFIX) if n.startswith(_PREFIX) else n: t for n, t in tensors.items()}


FAMILY = NemotronHFamily()
