"""Mamba-2 (`model_type: mamba2`), as transformers' Mamba2ForCausalLM holds it.

in_proj puts out, in this order: the gate z (D), the convolution's input x (D), B (G N) and C (G N), and dt (H). x, B
and C all pass conv1d and silu. The state dimension N appears in the B and C rows of in_proj and in the same channels of
conv1d, once for each of the G groups; A_log, D and dt_bias have one number a head.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Mamba2Config

from ..scan import ScanInputs, SsdInputs, ssd_scan
from .backbone import BackboneArchitecture, causal_conv, cut_tensors
from .base import Cut, Dimensions, Readers


@dataclass(frozen=True)
class Mamba2Dimensions(Dimensions):
    """The sizes of a Mamba-2; `dt_rank` is the number of heads, as in_proj puts out one time step a head."""

    head_dim: int
    n_groups: int

    @property
    def groups(self) -> int:
        """Groups of heads, each with B and C of its own."""
        return self.n_groups

    @property
    def heads(self) -> int:
        """Heads of head_dim channels."""
        return self.dt_rank

    def state_bytes(self, itemsize: int = 4) -> int:
        """Bytes of recurrent state one sequence occupies: the SSM state and the convolution's window, all layers."""
        window = (self.d_inner + 2 * self.n_groups * self.d_state) * self.d_conv
        return self.mixers * (self.d_inner * self.d_state + window) * itemsize


class Mamba2Architecture(BackboneArchitecture):
    """Adapter for Mamba-2; see `Architecture` for what each method promises."""

    model_type = "mamba2"
    has_gpu_scan = False

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

    def resized(self, config: Mamba2Config, *, n_layer: int, d_inner: int, d_state: int) -> Mamba2Config:
        """A configuration of the same family with other sizes; d_inner is fixed by expand, heads and head_dim.

        Raises:
            ValueError: another d_inner.
        """
        if d_inner != self.dimensions(config).d_inner:
            raise ValueError("a Mamba-2 of another d_inner cannot be loaded by transformers")
        other = copy.deepcopy(config)
        other.num_hidden_layers, other.state_size = n_layer, d_state
        return other

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
        return self.gated(mixer, y, inputs.z), state

    def gated(self, mixer: nn.Module, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """What out_proj reads of the scan's output and the gate before silu, (B, L, D) each."""
        return mixer.norm(y, z)

    def scan_groups(self, mixer: nn.Module, inputs: SsdInputs) -> list[ScanInputs]:
        """The groups of heads; a head is a Mamba-1 whose channels have one time step and one rate between them."""
        by_channel = inputs.dt.repeat_interleave(inputs.head_dim, dim=2)
        skip = inputs.D.repeat_interleave(inputs.head_dim)
        width, groups = inputs.d_inner // inputs.groups, []
        for group, A_log in enumerate(self.rates(mixer)):
            channels = slice(group * width, (group + 1) * width)
            groups.append(
                ScanInputs(
                    u=inputs.u[..., channels],
                    dt=by_channel[..., channels],
                    A=-torch.exp(A_log.float()),
                    B=inputs.B[:, :, group],
                    C=inputs.C[:, :, group],
                    D=skip[channels],
                    z=None if inputs.z is None else inputs.z[..., channels],
                )
            )
        return groups

    def rates(self, mixer: nn.Module) -> list[torch.Tensor]:
        """A_log of each group, (D / G, N): a head's one number for all of its channels and states."""
        by_channel = mixer.A_log.repeat_interleave(mixer.head_dim)[:, None]  # (D, 1)
        return list(by_channel.expand(-1, mixer.ssm_state_size).chunk(mixer.n_groups))

    def gains(self, mixer: nn.Module, group: int, inputs: ScanInputs, states: torch.Tensor) -> torch.Tensor:
        """Gate and gated norm; the norm's factor is that of the whole read-out, with all states there."""
        gate = F.silu(inputs.z.float())  # (B, L, D)
        y = (inputs.C.float()[:, :, None] @ states).squeeze(2) + inputs.D.float() * inputs.u.float()  # (B, L, D)
        scale = torch.rsqrt((y * gate).square().mean(-1, keepdim=True) + mixer.norm.variance_epsilon)
        return gate * scale * mixer.norm.weight.float().chunk(mixer.n_groups)[group]

    def readers(self, mixer: nn.Module, group: int) -> Readers:
        """The C rows of in_proj and the C channels of conv1d of a group."""
        n, first = mixer.ssm_state_size, mixer.intermediate_size + mixer.n_groups * mixer.ssm_state_size
        channels = slice(first + group * n, first + (group + 1) * n)
        rows = slice(mixer.intermediate_size + channels.start, mixer.intermediate_size + channels.stop)  # z comes first
        in_bias, bias = mixer.in_proj.bias, mixer.conv1d.bias
        return Readers(
            weight=mixer.in_proj.weight.data[rows],
            in_bias=None if in_bias is None else in_bias.data[rows],
            taps=mixer.conv1d.weight.data[channels, 0],
            bias=None if bias is None else bias.data[channels],
        )

    def change_skip(self, mixer: nn.Module, group: int, change: torch.Tensor) -> None:
        """Add to the skip D of a group's heads, in place; `change` is (H / G,)."""
        with torch.no_grad():
            mixer.D.view(mixer.n_groups, -1)[group] += change.to(mixer.D)

    def module_weights(self, mixer: nn.Module) -> dict[str, torch.Tensor]:
        """The weights of the mixer's linear maps by name, (out, in), and of its conv1d, (D + 2 G N, K); views."""
        weights = {name: getattr(mixer, name).weight.data for name in ("in_proj", "out_proj")}
        return {**weights, "conv1d": mixer.conv1d.weight.data.squeeze(1)}

    def module_inputs(self, block: nn.Module, hidden: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """What each of these modules reads when the block reads `hidden`, and what the block returns.

        Args:
            block: a Mamba2Block.
            hidden: (B, L, d_model).

        Returns:
            Inputs by module name, (B, L, in) or (B, L, D + 2 G N) for conv1d; the block's output (B, L, d_model).
        """
        mixer, normed = self.mixer(block), self.normed(block, hidden)
        x, z = self.expand(mixer, normed)
        y, _ = self.scan(mixer, self.scan_inputs(mixer, x, z))
        return {"in_proj": normed, "conv1d": x, "out_proj": y}, self.output(block, hidden, y)

    def remove_ssm(self, block: nn.Module) -> None:
        """Silence the states of a block in place; the convolution, the skip D, the gate and the norm stay."""
        self.mask_states(self.mixer(block), kept=[])

    def mask_states(self, mixer: nn.Module, kept: Sequence[int], mixing: torch.Tensor | None = None) -> None:
        """Silence all states but `kept` in place.

        B and C pass conv1d and silu, and silu(bias) is not zero: a state is silent when its rows of in_proj and its
        channels of conv1d, biases included, are all zero, for B and for C.

        Args:
            mixer: a Mamba2Mixer.
            kept: the states that stay, of G N: state n of group g is number g N + n.
            mixing: not for Mamba-2, where a mixture of C rows does not pass conv1d and silu.
        """
        if mixing is not None:
            raise ValueError("a mixing matrix does not fold into a Mamba-2: B and C pass conv1d and silu")
        dropped = self._dropped(mixer, kept)
        with torch.no_grad():
            for tensor, rows in self._state_rows(mixer, dropped):
                tensor[rows] = 0

    def is_masked(self, mixer: nn.Module, kept: Sequence[int]) -> bool:
        """Whether B and C of every state outside `kept` are zero, so that cutting it changes nothing."""
        dropped = self._dropped(mixer, kept)
        return all(not tensor[rows].any() for tensor, rows in self._state_rows(mixer, dropped))

    def cut_states(
        self, tensors: Mapping[str, torch.Tensor], config: Mamba2Config, kept: Sequence[Sequence[int]]
    ) -> tuple[dict[str, torch.Tensor], Mamba2Config, list[Cut]]:
        """Remove all states but `kept[layer]` from a whole state dict and its configuration.

        Every group of a layer keeps the same number, as its B and C are one block of in_proj.
        """
        sizes = self.dimensions(config)
        total = sizes.n_groups * sizes.d_state
        out, cuts = dict(tensors), []
        for layer, states in enumerate(kept):
            prefix = self.mixer_prefix(layer)
            if prefix + "A_log" not in tensors:  # a layer of another kind
                continue
            keep = torch.as_tensor(list(states))
            channels = torch.cat([torch.arange(sizes.d_inner), sizes.d_inner + keep, sizes.d_inner + total + keep])
            rows = torch.cat([torch.arange(sizes.d_inner), sizes.d_inner + channels])
            steps = 2 * sizes.d_inner + 2 * total + torch.arange(sizes.heads)
            rows = torch.cat([rows, steps])
            plan = {"in_proj.weight": rows, "in_proj.bias": rows, "conv1d.weight": channels, "conv1d.bias": channels}
            plan = {prefix + name: (0, index) for name, index in plan.items() if prefix + name in tensors}
            cut_tensors(out, cuts, plan)
        most = max(map(len, kept)) // sizes.n_groups
        return out, self.resized(config, n_layer=sizes.n_layer, d_inner=sizes.d_inner, d_state=most), cuts

    @staticmethod
    def _dropped(mixer: nn.Module, kept: Sequence[int]) -> torch.Tensor:
        """The states outside `kept`, ascending."""
        gone = torch.ones(mixer.n_groups * mixer.ssm_state_size, dtype=torch.bool, device=mixer.D.device)
        gone[torch.as_tensor(list(kept), dtype=torch.long)] = False
        return gone.nonzero().flatten()

    @staticmethod
    def _state_rows(mixer: nn.Module, states: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Everything that holds B and C, and the rows of it that belong to some states."""
        d, total = mixer.intermediate_size, mixer.n_groups * mixer.ssm_state_size
        channels = torch.cat([d + states, d + total + states])  # of conv1d: x, B, C
        parts = [(mixer.in_proj.weight, d + channels), (mixer.in_proj.bias, d + channels)]  # z comes first
        parts += [(mixer.conv1d.weight, channels), (mixer.conv1d.bias, channels)]
        return [(tensor.data, rows) for tensor, rows in parts if tensor is not None]
