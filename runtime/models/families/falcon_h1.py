"""Falcon-H1 (`model_type: falcon_h1`), as transformers' FalconH1ForCausalLM holds it.

Every block has a Mamba-2 mixer and attention side by side, then an MLP. Multipliers stand before in_proj and behind
each part of its output, and the gated norm may be missing or come before the gate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ssmc.runtime.later import F, nn, torch
from ssmc.runtime.models.architectures.capabilities import Otherwise
from ssmc.runtime.models.architectures.mamba2_hybrid import CAPABILITIES, Mamba2Hybrid
from ssmc.runtime.models.architectures.plan import CHANNEL, HEAD, STATE
from ssmc.runtime.models.architectures.surgery import Sizes
from ssmc.runtime.models.architectures.units import GATED, MLP, Attention, Part, Writer
from ssmc.runtime.scan import ScanInputs


class FalconH1Family(Mamba2Hybrid):
    """Adapter for Falcon-H1; see `interface` for what each method promises."""

    model_type = "falcon_h1"
    capabilities = replace(CAPABILITIES, free_width=True)
    mixer_name = "mamba"
    final_norm = "final_layernorm"
    units = (Part(MLP, "feed_forward", GATED, "down_proj", "intermediate_size"), Attention())
    writers = (
        Writer("mamba.out_proj", 0, "ssm_out_multiplier"),
        Writer("self_attn.o_proj", 0, "attn_out_multiplier"),
        Writer("feed_forward.down_proj", 1, "feed_forward.down_multiplier"),
    )
    middle = "pre_ff_layernorm"

    def otherwise(self, config: Any) -> Sequence[Otherwise]:
        """mlx-lm misses keys by their name, and scales queries and keys where it should all that attention reads."""
        found = list(super().otherwise(config))
        if (config.attention_in_multiplier, config.key_multiplier) != (1, 1):
            what = "it does not scale keys and values of attention as the model asks for, so its results are wrong"
            found.append(Otherwise("mlx-lm", what, wrong=True))
        return found

    def width(self, config: Any) -> int:
        """d_inner of the mixers."""
        return super().width(config) if config.mamba_d_ssm is None else config.mamba_d_ssm

    def set_width(self, config: Any, d_inner: int) -> None:
        """It has a field of its own."""
        config.mamba_d_ssm = d_inner

    def after_narrow(self, mixer: nn.Module, dimension: str, sizes: Sizes, left: int) -> None:
        """The multipliers of what in_proj puts out go with its rows; each part of them is one number."""
        super().after_narrow(mixer, dimension, sizes, left)
        if dimension == CHANNEL:
            d, n = sizes[CHANNEL], sizes[STATE]
            z, x, B, C, dt = mixer.mup_vector.split([d, d, n, n, sizes[HEAD]], dim=-1)
            mixer.mup_vector = torch.cat([z[..., :left], x[..., :left], B, C, dt[..., : mixer.num_heads]], dim=-1)

    def layers_with_mixers(self, config: Any) -> Sequence[int]:
        """All of them."""
        return range(config.num_hidden_layers)

    def layers_with_attention(self, config: Any) -> Sequence[int]:
        """All of them."""
        return range(config.num_hidden_layers)

    def expand(self, mixer: nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Apply in_proj and the multipliers: the convolution's input, and the gate with dt."""
        sizes = [mixer.intermediate_size, mixer.conv_dim, mixer.num_heads]
        projected = mixer.in_proj(hidden * mixer.ssm_in_multiplier) * mixer.mup_vector
        z, x, dt = projected.split(sizes, dim=-1)
        return x, (z, dt)

    def module_inputs(self, block: nn.Module, hidden: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """What each of the modules reads when the block reads `hidden`, and what the block returns."""
        read, output = super().module_inputs(block, hidden)
        return read | {"in_proj": read["in_proj"] * self.mixer(block).ssm_in_multiplier}, output

    def read_by_in_proj(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """What the C rows of in_proj multiply when the block reads `hidden`, the multiplier of C included."""
        mixer = self.mixer(block)
        of_c = 2 * mixer.intermediate_size + mixer.n_groups * mixer.ssm_state_size  # behind z, x and B; one for all C
        return self.normed(block, hidden) * (mixer.ssm_in_multiplier * mixer.mup_vector[..., of_c])

    def gated(self, mixer: nn.Module, y: torch.Tensor, z: torch.Tensor, backend: str = "auto") -> torch.Tensor:
        """What out_proj reads of the scan's output and the gate: through the gated norm where there is one."""
        return super().gated(mixer, y, z, backend) if mixer.mamba_rms_norm else y * F.silu(z)

    def norm_form(self, mixer: nn.Module) -> tuple[int, bool]:
        """Of how many groups of channels the gated norm takes the mean square, and whether the gate comes first."""
        return mixer.norm.n_groups, not mixer.norm.norm_before_gate

    def gains(self, mixer: nn.Module, group: int, inputs: ScanInputs, states: torch.Tensor) -> torch.Tensor | None:
        """The gate, alone or with a norm behind or before it."""
        return super().gains(mixer, group, inputs, states) if mixer.mamba_rms_norm else None

    def gains_of(self, mixer: nn.Module, group: int, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """The same from a group's read-out, skip included, and its gate before silu, (B, L, D / G) each."""
        if not mixer.mamba_rms_norm:
            return F.silu(z.float())
        if not mixer.norm.norm_before_gate:
            return super().gains_of(mixer, group, y, z)
        scale = torch.rsqrt(y.square().mean(-1, keepdim=True) + mixer.norm.variance_epsilon)
        return F.silu(z.float()) * scale * mixer.norm.weight.float().chunk(mixer.n_groups)[group]


FAMILY = FalconH1Family()
