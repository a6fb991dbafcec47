"""What the hybrids with Mamba-2 mixers have in common: the mixers name their tensors as Mamba2Mixer does."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

from ssmc.runtime.models.architectures.capabilities import MAMBA_ALONE, Capabilities
from ssmc.runtime.models.architectures.dimensions import Mamba2HybridDimensions
from ssmc.runtime.models.architectures.layouts.hybrid import Hybrid
from ssmc.runtime.models.architectures.mamba2 import Mamba2
from ssmc.runtime.models.architectures.plan import CHANNEL

CAPABILITIES = Capabilities(
    fixed={
        CHANNEL: "its channels form heads, which --pattern head and head-dim remove",
    },
    heads=True,
    uniform=False,
    gpu_scan=True,
    gpu_gradients=True,
    gpu_sums=True,
    unknown_to=MAMBA_ALONE,
)


class Fields(NamedTuple):
    """What a configuration calls the sizes of its mixers."""

    heads: str = "mamba_n_heads"
    head_dim: str = "mamba_d_head"
    n_groups: str = "mamba_n_groups"
    d_conv: str = "mamba_d_conv"


class Mamba2Hybrid(Hybrid, Mamba2):
    """As it stands for Bamba and GraniteMoeHybrid, whose configurations name their sizes alike."""

    capabilities = CAPABILITIES
    state_field = "mamba_d_state"
    fields = Fields()

    def dimensions(self, config: Any) -> Mamba2HybridDimensions:
        """Read the sizes out of a transformers configuration."""
        named = {size: getattr(config, field) for size, field in self.fields._asdict().items()}
        return Mamba2HybridDimensions(
            n_layer=config.num_hidden_layers,
            d_model=config.hidden_size,
            d_inner=self.width(config),
            d_state=getattr(config, self.state_field),
            dt_rank=named.pop("heads"),
            vocab_size=config.vocab_size,
            mamba_layers=len(self.layers_with_mixers(config)),
            **named,
        )

    def width(self, config: Any) -> int:
        """d_inner of the mixers."""
        return int(config.mamba_expand * config.hidden_size)

    def with_heads(self, config: Any, heads: int, head_dim: int) -> Any:
        """A configuration whose mixers have so many heads of so many channels."""
        other = copy.deepcopy(config)
        setattr(other, self.fields.heads, heads)
        setattr(other, self.fields.head_dim, head_dim)
        self.set_width(other, heads * head_dim)
        return other

    def set_width(self, config: Any, d_inner: int) -> None:
        """Tell a configuration, in place, the d_inner of its mixers: a whole multiple of d_model."""
        config.mamba_expand = d_inner // config.hidden_size

    def layers_with_mixers(self, config: Any) -> Sequence[int]:
        """The numbers of the layers that have one."""
        return [layer for layer, kind in enumerate(config.layers_block_type) if kind == "linear_attention"]
