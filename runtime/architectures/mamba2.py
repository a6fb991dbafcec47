"""Mamba-2 (`model_type: mamba2`), as transformers' Mamba2ForCausalLM holds it.

in_proj puts out, in this order: the gate z (D), the convolution's input x (D), B (G N) and C (G N), and dt (H). x, B and
C all pass conv1d and silu. The state dimension N appears in the B and C rows of in_proj and in the same channels of
conv1d, once for each of the G groups; A_log, D and dt_bias have one number a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Mamba2Config

from ..scan import SsdInputs, ssd_scan
from .base import Dimensions
from .mamba import MambaArchitecture, causal_conv


@dataclass(frozen=True)
class Mamba2Dimensions(Dimensions):
    """The sizes of a Mamba-2; `dt_rank` is the number of heads, as in_proj puts out one time step a head."""

    head_dim: int
    n_groups: int

    def state_bytes(self, itemsize: int = 4) -> int:
        """Bytes of recurrent state one sequence occupies: the SSM state and the convolution's window, all layers."""
        window = (self.d_inner + 2 * self.n_groups * self.d_state) * self.d_conv
        return self.n_layer * (self.d_inner * self.d_state + window) * itemsize


class Mamba2Architecture(MambaArchitecture):
    """Adapter for Mamba-2; see `Architecture` for what each method promises."""

    model_type = "mamba2"

    def dimensions(self, config: Mamba2Config) -> Mamba2Dimensions:
        """Read the sizes out of a transformers configuration."""
        return Mamba2Dimensions(
            n_layer=config.num_hidden_layers,
            d_model=config.hidden_size,
            d_inner=int(config.expand * config.hidden_size),
            d_state=config.state_size,
            dt_rank=config.num_heads,
            d_conv=config.conv_kernel,
            vocab_size=config.vocab_size,
            head_dim=config.head_dim,
            n_groups=config.n_groups,
        )

    def expand(self, mixer: nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Apply in_proj: the convolution's input (B, L, D + 2 G N), and the gate (B, L, D) with dt (B, L, H)."""
        sizes = [mixer.intermediate_size, mixer.conv_dim, mixer.num_heads]
        z, x, dt = mixer.in_proj(hidden).split(sizes, dim=-1)
        return x, (z, dt)

    def scan_inputs(
        self,
        mixer: nn.Module,
        x: torch.Tensor,
        z: tuple[torch.Tensor, torch.Tensor],
        history: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> SsdInputs:
        """Everything between in_proj and the scan.

        Args:
            mixer: a Mamba2Mixer.
            x: (B, L, D + 2 G N) the convolution's input.
            z: the gate before silu and dt before its bias, as `expand` returns them.
            history: (B, d_conv - 1, D + 2 G N) the inputs that came before x; None stands for zeros.
            attention_mask: (B, L), 0 at padding: padded positions drive no state (as in transformers).
        """
        gate, dt = z
        u = mixer.act(causal_conv(x, mixer.conv1d.weight, mixer.conv1d.bias, history))
        if attention_mask is not None:
            u = u * attention_mask[:, :, None].to(u.dtype)
        n, g = mixer.ssm_state_size, mixer.n_groups
        u, B, C = u.split([mixer.intermediate_size, g * n, g * n], dim=-1)
        dt = F.softplus(dt.float() + mixer.dt_bias.float())
        low, high = mixer.time_step_limit
        if (low, high) != (0.0, float("inf")):
            dt = dt.clamp(low, high)
        B, C = B.unflatten(2, (g, n)), C.unflatten(2, (g, n))
        return SsdInputs(u=u, dt=dt, A=-torch.exp(mixer.A_log.float()), B=B, C=C, D=mixer.D, z=gate)

    def scan(
        self, mixer: nn.Module, inputs: SsdInputs, state: torch.Tensor | None = None, backend: str = "auto"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What out_proj reads, (B, L, D), and the state after the last token, (B, H, P, N)."""
        y, state = ssd_scan(inputs, state, backend)
        return mixer.norm(y, inputs.z), state
