"""Falcon-H1 in an ONNX graph: a Mamba-2 mixer and attention side by side, then an MLP; factors go into the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import OpBuilder

from ssmc.exporters.onnx.family import Block
from ssmc.exporters.onnx.hybrid import TwoStages, scaled
from ssmc.runtime.models.families import architecture_for


class FalconH1Graph(TwoStages):
    """See `TwoStages`."""

    final_norm = "model.final_layernorm.weight"
    middle = "pre_ff_layernorm"

    def has_mixer(self, config: Any, layer: int) -> bool:
        """Every layer."""
        return True

    def has_attention(self, config: Any, layer: int) -> bool:
        """Every layer."""
        return True

    def embedding_scale(self, config: Any) -> float:
        """Its own."""
        return float(config.embedding_multiplier)

    def logits_scale(self, config: Any) -> float:
        """Its own."""
        return float(config.lm_head_multiplier)

    def mixer_config(self, config: Any) -> Any:
        """With where its gated norm is."""
        view = super().mixer_config(config)
        view.gated_norm = "gate first" if not config.mamba_norm_before_gate else "norm first"
        view.gated_norm = view.gated_norm if config.mamba_rms_norm else "none"
        return view

    def folded(self, config: Any, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """All factors that stand beside a linear map."""
        sizes = architecture_for(config.model_type).dimensions(config)
        shared = sizes.groups * sizes.d_state
        parts = (sizes.d_inner, sizes.d_inner, shared, shared, sizes.heads)  # z, x, B, C and dt
        rows = [torch.full((n,), float(m)) for n, m in zip(parts, config.ssm_multipliers, strict=True)]
        gate, down = config.mlp_multipliers
        read = float(config.attention_in_multiplier)
        # the factor of what in_proj reads does not act on its bias; the graph has none where there is one
        return scaled(
            tensors,
            [
                ("mamba.in_proj", torch.cat(rows) * float(config.ssm_in_multiplier)),
                ("mamba.out_proj", float(config.ssm_out_multiplier)),
                ("self_attn.q_proj", read),
                ("self_attn.k_proj", read * float(config.key_multiplier)),
                ("self_attn.v_proj", read),
                ("self_attn.o_proj", float(config.attention_out_multiplier)),
                ("feed_forward.gate_proj", float(gate)),
                ("feed_forward.down_proj", float(down)),
            ],
        )

    def first(self, op: OpBuilder, block: Block, normed: ir.Value) -> tuple[ir.Value, dict[str, ir.Value]]:
        """Both, side by side."""
        mixed, states = self.mix(op, block, normed)
        attended, cache = self.attend(op, block, normed)
        return op.Add(mixed, attended), states | cache


GRAPH = FalconH1Graph()
