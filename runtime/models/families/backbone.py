"""What the pure Mamba models of transformers have in common: a backbone of blocks that each hold one mixer."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ssmc.runtime.models.families.base import Cut


class BackboneArchitecture:
    """The part of an adapter that is the same for MambaForCausalLM and Mamba2ForCausalLM."""

    has_normed_readers = False
    is_hybrid = False
    shares_blocks = False
    embedding = "backbone.embeddings.weight"
    mixer_name = "mixer"
    state_field = "state_size"  # of the configuration

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """The residual blocks in the order they run."""
        return model.backbone.layers

    def head(self, model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (B, L, vocab) from the last block's output (B, L, d_model)."""
        return self.logits(model, model.backbone.norm_f(hidden))

    def embed(self, model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        """What the first block reads, (B, L, d_model), of (B, L) tokens."""
        return model.get_input_embeddings()(tokens)

    def record_arguments(self, model: nn.Module, tokens: torch.Tensor) -> None:
        """A block needs nothing but its input."""

    def run(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """What a block makes of `hidden`, (B, L, d_model) both."""
        return block(hidden)

    def mixed(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden` and what the mixer alone puts out for it, (B, L, d_model): all that a block does."""
        return self.run(block, hidden)

    def output(self, block: nn.Module, hidden: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """What a block makes of `hidden`, (B, L, d_model), when what out_proj reads is known, (B, L, D)."""
        return hidden + self.mixer(block).out_proj(y)

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

    def normed(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """What the mixer of `block` reads when the block reads `hidden`, both (B, L, d_model)."""
        return block.norm(hidden.to(block.norm.weight.dtype))

    def read_by_in_proj(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """What the C rows of in_proj multiply when the block reads `hidden`, multipliers of their output included."""
        return self.normed(block, hidden)

    def scanned(self, block: nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the scan and out_proj read when the block reads `hidden`: u, and y with its gate, each (B, L, D)."""
        mixer = self.mixer(block)
        inputs = self.scan_inputs(mixer, *self.expand(mixer, self.normed(block, hidden)))
        y, _ = self.scan(mixer, inputs)
        return inputs.u, y

    def remove_block(self, block: nn.Module) -> None:
        """Make a block hand on what it reads: out_proj becomes zero, so nothing is added to the residual stream."""
        with torch.no_grad():
            for parameter in block.mixer.out_proj.parameters():
                parameter.zero_()

    def with_epsilons_of(self, model: nn.Module, config: Any) -> None:
        """Nothing to do where no norm is taken over channels."""

    def is_removed(self, block: nn.Module) -> bool:
        """Whether a block hands on what it reads: its out_proj is zero."""
        return not any(bool(parameter.any()) for parameter in block.mixer.out_proj.parameters())

    def logits(self, model: nn.Module, normed: torch.Tensor) -> torch.Tensor:
        """Logits (B, L, vocab) from what the last norm puts out (B, L, d_model)."""
        return model.lm_head(normed.to(model.lm_head.weight.dtype)).float()

    def uses(self, name: str, config: Any) -> float:
        """How often a token goes through a matrix of the model, on average."""
        return 1.0

    def from_stored(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors by the model's names from those by the names they are stored under."""
        return tensors

    def to_stored(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors by the names they are stored under from those by the model's names."""
        return tensors

    def with_states(self, config: Any, d_state: int) -> Any:
        """A configuration with another number of states and all else the same."""
        other = copy.deepcopy(config)
        setattr(other, self.state_field, d_state)
        return other

    def cut_blocks(
        self, tensors: Mapping[str, torch.Tensor], config: Any, removed: Sequence[int]
    ) -> tuple[dict[str, torch.Tensor], Any, list[Cut]]:
        """Remove whole blocks from a state dict and its configuration; those that stay are numbered anew."""
        kept = [layer for layer in range(config.num_hidden_layers) if layer not in removed]
        number = {f"backbone.layers.{old}.": f"backbone.layers.{new}." for new, old in enumerate(kept)}
        out, cuts = {}, []
        for name, tensor in tensors.items():
            prefix = re.match(r"backbone\.layers\.\d+\.|", name)[0]
            if not prefix or prefix in number:
                out[number.get(prefix, "") + name[len(prefix) :]] = tensor
            else:
                cuts.append(Cut(name, tuple(tensor.shape), ()))
        smaller = copy.deepcopy(config)
        smaller.num_hidden_layers = len(kept)
        return out, smaller, cuts


def cut_tensors(
    tensors: dict[str, torch.Tensor], cuts: list[Cut], plan: Mapping[str, tuple[int, torch.Tensor]]
) -> None:
    """Keep some rows of some tensors, in place in the dict, and list the change. `plan`: name -> axis, kept indices."""
    for name, (axis, index) in plan.items():
        before = tensors[name]
        tensors[name] = before.index_select(axis, index).contiguous()
        cuts.append(Cut(name, tuple(before.shape), tuple(tensors[name].shape)))


@torch.no_grad()
def silence(mixer: nn.Module, plan: Mapping[str, tuple[int, torch.Tensor]]) -> None:
    """Zero some channels of a mixer's parameters in place, but for A_log. `plan`: name -> axis, indices to zero."""
    for name, (axis, index) in plan.items():
        if name != "A_log":
            mixer.get_parameter(name).index_fill_(axis, index, 0)


def causal_conv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, history: torch.Tensor | None = None
) -> torch.Tensor:
    """Depthwise causal convolution with channels last: y_t = bias + sum_k w_k x_{t-K+1+k}.

    K shifted multiply-adds are 7 to 25 times faster here than `F.conv1d`, which wants (B, D, L) and pays two
    transposes and a slow depthwise path for it.

    Args:
        x: (B, L, D).
        weight: (D, 1, K).
        bias: (D,) or None.
        history: (B, K - 1, D) the inputs before x; None stands for zeros.
    """
    taps = weight.squeeze(1).t().contiguous()  # (K, D)
    width, length = taps.shape[0], x.shape[1]
    padded = F.pad(x, (0, 0, width - 1, 0)) if history is None else torch.cat([history.to(x.dtype), x], dim=1)
    if length == 1:  # decode: fewer calls
        y = (padded * taps).sum(dim=1, keepdim=True)
        return y if bias is None else y.add_(bias)
    y = padded[:, :length] * taps[0] if bias is None else torch.addcmul(bias, padded[:, :length], taps[0])
    for k in range(1, width):
        y.addcmul_(padded[:, k : k + length], taps[k])  # in place: autograd does not need y
    return y
