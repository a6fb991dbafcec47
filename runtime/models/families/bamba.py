"""Bamba (`model_type: bamba`), as transformers' BambaForCausalLM holds it: Mamba-2 layers among layers of attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ssmc.runtime.models.architectures.mamba2_hybrid import CAPABILITIES, Mamba2Hybrid
from ssmc.runtime.models.architectures.units import GATED, MLP, Attention, Part, Writer


class BambaFamily(Mamba2Hybrid):
    """Adapter for Bamba; see `interface` for what each method promises."""

    model_type = "bamba"
    capabilities = replace(
        CAPABILITIES, unknown_to=CAPABILITIES.unknown_to | {"mlx-lm", "vllm"}
    )  # vLLM had it until 0.22
    mixer_name = "mamba"
    final_norm = "final_layernorm"
    units = (Part(MLP, "feed_forward", GATED, "down_proj", "intermediate_size"), Attention())
    writers = (Writer("mamba.out_proj"), Writer("self_attn.o_proj"), Writer("feed_forward.down_proj", 1))
    middle = "pre_ff_layernorm"

    def keep_layers(self, config: Any, kept: Sequence[int]) -> None:
        """Layers of attention are listed by their numbers."""
        super().keep_layers(config, kept)
        config.attn_layer_indices = [n for n, layer in enumerate(kept) if layer in (config.attn_layer_indices or [])]


FAMILY = BambaFamily()
