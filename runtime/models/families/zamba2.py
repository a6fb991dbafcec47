"""Zamba2 (`model_type: zamba2`), as transformers' Zamba2ForCausalLM holds it.

Every layer has a Mamba-2 mixer. Before some of them runs one of a few transformer blocks that these layers share. It
reads the layer's input and the embeddings of the tokens, and what it puts out is added to what the mixer reads, not to
the residual stream. So what a layer reads is three vectors here, (B, L, 3 d_model): the stream, the embeddings, and
what the shared block put out for this layer, which `enter` computes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ssmc.runtime.later import nn, torch
from ssmc.runtime.models.architectures.capabilities import BLOCK, Otherwise
from ssmc.runtime.models.architectures.mamba2_hybrid import CAPABILITIES, Fields, Mamba2Hybrid
from ssmc.runtime.models.architectures.plan import MODEL, Cut
from ssmc.runtime.models.architectures.units import ATTENTION, MLP, Writer

_INNER, _OUTER = ".mamba_decoder.mamba.", ".mamba."  # where a layer with a shared block has its mixer, and the others


class Zamba2Family(Mamba2Hybrid):
    """Adapter for Zamba2; see `interface` for what each method promises."""

    model_type = "zamba2"
    capabilities = replace(
        CAPABILITIES,
        shared_blocks=True,
        fixed={
            **CAPABILITIES.fixed,
            **dict.fromkeys((MLP, ATTENTION, BLOCK), "its transformer blocks belong to many layers"),
            MODEL: "its shared blocks read the embedding beside the residual stream",
        },
        unknown_to=CAPABILITIES.unknown_to | {"llama.cpp", "mlx-lm"},
    )
    without_limits = ("vllm",)
    mixer_name = "mamba"
    final_norm = "final_layernorm"
    writers = (Writer("mamba.out_proj"), Writer("mamba_decoder.mamba.out_proj"))
    fields = Fields("n_mamba_heads", "mamba_headdim", "mamba_ngroups")

    def time_step_limits(self, config: Any) -> tuple[float, float]:
        """transformers takes `time_step_min` for the least time step, whatever `time_step_limit` says."""
        return config.time_step_min, math.inf

    def otherwise(self, config: Any) -> Sequence[Otherwise]:
        """transformers 4.57 sums what is carried from chunk to chunk over the wrong axis, where it has no kernels."""
        what = (
            f"its release 4.57, without mamba_ssm's kernels, is wrong about prompts of more than {config.chunk_size} "
            "tokens; release 5 is not"
        )
        return [*super().otherwise(config), Otherwise("transformers", what, wrong=True, release="4.57")]

    def layers_with_mixers(self, config: Any) -> Sequence[int]:
        """All of them."""
        return range(config.num_hidden_layers)

    def kept_per_token(self, config: Any) -> int:
        """Numbers that attention keeps of every token: shared blocks have keys and values for each layer they serve."""
        return 2 * len(config.hybrid_layer_ids) * config.num_key_value_heads * config.attention_head_dim

    def mixer(self, block: nn.Module) -> nn.Module:
        """The state-space mixer inside a block."""
        return _layer(block).mamba

    def linears(self, block: nn.Module) -> dict[str, nn.Linear]:
        """None: those of the transformer blocks belong to several layers."""
        return {}

    def uses(self, name: str, config: Any) -> float:
        """How often a token goes through a matrix of the model, on average; adapters belong to one layer each."""
        if ".shared_transformer." not in name or "adapter" in name:
            return 1.0
        return len(config.hybrid_layer_ids) / min(config.num_mem_blocks, len(config.hybrid_layer_ids))

    def embed(self, model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        """What the first block reads of (B, L) tokens, (B, L, 3 d_model)."""
        embedded = super().embed(model, tokens)
        return torch.cat([embedded, embedded, torch.zeros_like(embedded)], dim=-1)

    def enter(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden` with what the shared block puts out for this layer in its last third."""
        stream, embedded, _ = hidden.chunk(3, dim=-1)
        shared = torch.zeros_like(stream)
        if hasattr(block, "shared_transformer"):
            given = self.recorded(block, hidden.device)
            given |= {"attention_mask": given.pop("causal_mask"), "original_hidden_states": embedded}
            given.pop("use_cache", None)
            shared = block.linear(block.shared_transformer(stream, **given))
        return torch.cat([stream, embedded, shared], dim=-1)

    def normed(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """What the mixer of `block` reads when the block reads `hidden`, (B, L, 3 d_model)."""
        stream, _, shared = hidden.chunk(3, dim=-1)
        norm = _layer(block).input_layernorm
        return norm((stream + shared).to(norm.weight.dtype))

    def run(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """What a block puts out for `hidden` after `enter`, (B, L, 3 d_model) both."""
        mask = self.recorded(block, hidden.device)["attention_mask"]
        stream, embedded, shared = hidden.chunk(3, dim=-1)
        stream = stream + self.mixer(block)(self.normed(block, hidden), attention_mask=mask)
        return torch.cat([stream, embedded, torch.zeros_like(shared)], dim=-1)

    def mixed(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden` and, in its first third, what the mixer alone puts out for it."""
        stream, *rest = hidden.chunk(3, dim=-1)
        mixer = self.mixer(block)
        _, y = self.scanned(block, hidden)
        return torch.cat([stream + mixer.out_proj(y.to(mixer.out_proj.weight.dtype)), *rest], dim=-1)

    def head(self, model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (B, L, vocab) from the last block's output (B, L, 3 d_model)."""
        return super().head(model, hidden.chunk(3, dim=-1)[0])

    def cut(
        self, tensors: Mapping[str, torch.Tensor], config: Any, dimension: str, kept: Sequence[Sequence[int]]
    ) -> tuple[dict[str, torch.Tensor], Any, list[Cut]]:
        """Remove all but `kept[layer]` from a whole state dict and its configuration."""
        own = {name.replace(_INNER, _OUTER): name for name in tensors}
        out, smaller, cuts = super().cut({n: tensors[name] for n, name in own.items()}, config, dimension, kept)
        return {own[name]: tensor for name, tensor in out.items()}, smaller, cuts


def _layer(block: nn.Module) -> nn.Module:
    """The part of a block that holds norm and mixer."""
    return getattr(block, "mamba_decoder", block)


FAMILY = Zamba2Family()
