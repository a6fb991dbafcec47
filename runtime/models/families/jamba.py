"""Jamba (`model_type: jamba`), as transformers' JambaForCausalLM holds it: Mamba-1 layers among layers of attention.

Every block has an MLP, or a mixture of them, behind its mixer. B, C and dt of a Mamba layer pass norms with weights,
which take a factor on the read-out of the states.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ssmc.runtime.later import torch
from ssmc.runtime.models.architectures.capabilities import BLOCK, MAMBA_ALONE, Capabilities, Otherwise
from ssmc.runtime.models.architectures.dimensions import HybridDimensions
from ssmc.runtime.models.architectures.experts import (
    EXPERT_WIDTH,
    GATED_MAPS,
    ExpertNeurons,
    Experts,
    experts_plan,
    whole_strides,
)
from ssmc.runtime.models.architectures.layouts.hybrid import Hybrid
from ssmc.runtime.models.architectures.normed import NormedMamba1
from ssmc.runtime.models.architectures.plan import CHANNEL, RANK, STATE
from ssmc.runtime.models.architectures.units import GATED, MLP, Attention, Part, Writer, attends_in_4, head_dim_of

_EXPERTS: dict[str, Any] = {"name": "feed_forward", "plan": experts_plan(GATED_MAPS, "router")}


class _Neurons(Part):
    """The MLPs, whose configuration has one width for them and for experts."""

    def refusal(self, config: Any) -> str | None:
        """Experts of the same width."""
        if max(config.layers_num_experts) <= 1:
            return None
        return f"its experts have the same width in the configuration, and --pattern {EXPERT_WIDTH} removes from both"


class _NeuronsBesideExperts(Part):
    """The same in a model with experts: they lose neurons where experts do."""

    def total(self, config: Any) -> int:
        """None where there are no experts."""
        return super().total(config) if max(config.layers_num_experts) > 1 else 0

    def allowed(self, config: Any) -> list[int]:
        """As for the experts."""
        return whole_strides(self.total(config))


class _Experts(Experts):
    """Its experts; a layer of one has an MLP in their place."""

    def how_many(self, config: Any) -> int:
        """None where all layers have one."""
        return super().how_many(config) if max(config.layers_num_experts) > 1 else 0


class _ExpertNeurons(ExpertNeurons):
    """Their neurons, likewise."""

    def how_many(self, config: Any) -> int:
        """None where all layers have one expert."""
        return super().how_many(config) if max(config.layers_num_experts) > 1 else 0


class JambaFamily(Hybrid, NormedMamba1):
    """Adapter for Jamba; see `interface` for what each method promises."""

    model_type = "jamba"
    capabilities = Capabilities(
        fixed={
            BLOCK: "which blocks are of which kind follows from their number, so none can go",
        },
        whole_expand=True,
        normed_readers=True,
        uniform=False,
        gpu_scan=True,
        gpu_gradients=True,
        gpu_sums=True,
        unknown_to=MAMBA_ALONE,
    )
    mixer_name = "mamba"
    plan = replace(
        NormedMamba1.plan,
        tensors={
            **NormedMamba1.plan.tensors,
            "dt_layernorm.weight": ((RANK,),),
            "b_layernorm.weight": ((STATE,),),
            "c_layernorm.weight": ((STATE,),),
        },
        constant=(*NormedMamba1.plan.constant, "b_layernorm.weight", "c_layernorm.weight"),
    )
    has_norm_weights = True
    behind_norm = ("b_layernorm.weight",)
    state_field = "mamba_d_state"
    final_norm = "final_layernorm"
    units = (
        _Neurons(MLP, "feed_forward", GATED, "down_proj", "intermediate_size"),
        _NeuronsBesideExperts(EXPERT_WIDTH, "feed_forward", GATED, "down_proj", "intermediate_size"),
        Attention(),
        _Experts(**_EXPERTS, least=2),
        _ExpertNeurons(**_EXPERTS, size="intermediate_size"),
    )
    writers = (
        *(Writer("mamba.out_proj"), Writer("self_attn.o_proj")),
        *(Writer("feed_forward.down_proj", 1), Writer("feed_forward.experts", 1)),
    )
    middle = "pre_ff_layernorm"
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

    def with_d_model(self, config: Any, count: int) -> Any:
        """d_inner is a whole multiple of d_model."""
        whole, rest = divmod(self.dimensions(config).d_inner, count)
        if rest:
            raise ValueError("d_inner is a whole multiple of hidden_size in a Jamba")
        other = copy.deepcopy(config)
        other.hidden_size, other.mamba_expand, other.head_dim = count, whole, head_dim_of(config)
        return other

    def with_size(self, config: Any, dimension: str, count: int) -> Any:
        """A configuration with so many states, or with that d_inner, a whole multiple of hidden_size."""
        if dimension != CHANNEL:
            return super().with_size(config, dimension, count)
        other = copy.deepcopy(config)
        other.mamba_expand = count // config.hidden_size
        return other

    def otherwise(self, config: Any) -> Sequence[Otherwise]:
        """mlx-lm makes the weights of the chosen experts sum to 1, transformers those of all experts."""
        experts = Otherwise("mlx-lm", "it weighs experts otherwise, so its results are wrong", wrong=True)
        return [*([experts] if config.num_experts > 1 else []), *attends_in_4(config)]

    def scale_readout(self, weights: Mapping[str, torch.Tensor], factor: float) -> None:
        """Multiply what is read out of the states: the weights of B's norm take the factor."""
        weights["b_layernorm.weight"].mul_(factor)


FAMILY = JambaFamily()
