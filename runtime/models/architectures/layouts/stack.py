"""What the pure Mamba models of transformers have in common: a stack of blocks that each hold a norm and a mixer."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from ssmc.runtime.later import nn, torch
from ssmc.runtime.models.architectures.experts import Mixture
from ssmc.runtime.models.architectures.layouts.blocks import without_blocks
from ssmc.runtime.models.architectures.plan import Cut
from ssmc.runtime.models.architectures.units import Part, Writer


class Stack:
    """Layout of MambaForCausalLM and those built like it; it comes before the class that knows the mixer."""

    embedding = "backbone.embeddings.weight"
    mixer_name = "mixer"
    last_norm = "backbone.norm_f"
    units: Sequence[Part] = ()
    middle = ""

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """The residual blocks in the order they run."""
        return model.backbone.layers

    def mixer(self, block: nn.Module) -> nn.Module:
        """The state-space mixer inside a block."""
        return block.mixer

    def mixer_prefix(self, layer: int) -> str:
        """How the names of a mixer's tensors start in the model's state dict."""
        return f"backbone.layers.{layer}.mixer."

    def block_prefix(self, layer: int) -> str:
        """How the names of a block's tensors start in the model's state dict."""
        return f"backbone.layers.{layer}."

    def linears(self, block: nn.Module) -> dict[str, nn.Linear]:
        """There is nothing in a block beside its mixer and the norm before it."""
        return {}

    def writers_in(self, block: nn.Module) -> list[Writer]:
        """out_proj of the mixer."""
        return [Writer(f"{self.mixer_name}.out_proj")]

    def mixtures_in(self, block: nn.Module) -> list[tuple[Mixture, Writer]]:
        """There are no experts."""
        return []

    def reading(self, block: nn.Module, stage: int) -> list[str]:
        """in_proj of the mixer."""
        return [f"{self.mixer_name}.in_proj.weight"]

    def norms_in(self, block: nn.Module) -> list[str]:
        """The norm before the mixer."""
        return ["norm"]

    def uses(self, name: str, config: Any) -> float:
        """How often a token goes through a matrix of the model, on average."""
        return 1.0

    def kept_per_token(self, config: Any) -> int:
        """Nothing: there is no attention."""
        return 0

    def from_stored(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors by the model's names from those by the names they are stored under."""
        return tensors

    def to_stored(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors by the names they are stored under from those by the model's names."""
        return tensors

    def embed(self, model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        """What the first block reads, (B, L, d_model), of (B, L) tokens."""
        return model.get_input_embeddings()(tokens)

    def record_arguments(self, model: nn.Module, tokens: torch.Tensor) -> None:
        """A block needs nothing but its input."""

    def enter(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden` as it is: nothing is computed before a block."""
        return hidden

    def normed(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """What the mixer of `block` reads when the block reads `hidden`, both (B, L, d_model)."""
        return block.norm(hidden.to(block.norm.weight.dtype))

    def run(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """What a block puts out for `hidden`, (B, L, d_model) both."""
        return block(hidden)

    def mixed(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden` and what the mixer alone puts out for it, (B, L, d_model): all that a block does."""
        return self.run(block, hidden)

    def output(self, block: nn.Module, hidden: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """What a block puts out for `hidden`, (B, L, d_model), when what out_proj reads is known, (B, L, D)."""
        return hidden + self.mixer(block).out_proj(y)

    def head(self, model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (B, L, vocab) from the last block's output (B, L, d_model)."""
        return self.logits(model, model.backbone.norm_f(hidden))

    def logits(self, model: nn.Module, normed: torch.Tensor) -> torch.Tensor:
        """Logits (B, L, vocab) from what the last norm puts out (B, L, d_model)."""
        return model.lm_head(normed.to(model.lm_head.weight.dtype)).float()

    def remove_block(self, block: nn.Module) -> None:
        """Make a block hand on what it reads: out_proj becomes zero, so nothing is added to the residual stream."""
        with torch.no_grad():
            for parameter in self.mixer(block).out_proj.parameters():
                parameter.zero_()

    def is_removed(self, block: nn.Module) -> bool:
        """Whether a block hands on what it reads: its out_proj is zero."""
        return not any(bool(parameter.any()) for parameter in self.mixer(block).out_proj.parameters())

    def cut_blocks(
        self, tensors: Mapping[str, torch.Tensor], config: Any, removed: Sequence[int]
    ) -> tuple[dict[str, torch.Tensor], Any, list[Cut]]:
        """Remove whole blocks from a state dict and its configuration; those that stay are numbered anew."""
        kept = [layer for layer in range(config.num_hidden_layers) if layer not in removed]
        out, cuts = without_blocks(tensors, self.block_prefix, kept)
        smaller = copy.deepcopy(config)
        smaller.num_hidden_layers = len(kept)
        return out, smaller, cuts
