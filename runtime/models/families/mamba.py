"""Mamba-1 (`model_type: mamba`), as transformers' MambaForCausalLM holds it.

The state dimension N appears in two tensors of a mixer: the columns of A_log (D, N), and the B rows and C rows of
x_proj, whose (dt_rank + 2 N) rows are stacked as dt, B, C. The channels D appear in all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers import MambaConfig

from ssmc.runtime.models.families.backbone import BackboneArchitecture, causal_conv, cut_tensors, silence
from ssmc.runtime.models.families.base import Cut, Dimensions, Readers
from ssmc.runtime.scan import ScanInputs, selective_scan

# Where a mixer's tensors have their channels; in_proj has them twice, for x and for z.
_CHANNEL_AXES = {"in_proj.weight": 0, "in_proj.bias": 0, "conv1d.weight": 0, "conv1d.bias": 0, "x_proj.weight": 1}
_CHANNEL_AXES |= {"dt_proj.weight": 0, "dt_proj.bias": 0, "A_log": 0, "D": 0, "out_proj.weight": 1}


class MambaArchitecture(BackboneArchitecture):
    """Adapter for Mamba-1; see `Architecture` for what each method promises."""

    model_type = "mamba"
    has_gpu_scan = True
    has_gpu_gradients = False
    has_gpu_sums = True
    by_state: Sequence[str] = ()  # tensors of a mixer with one number a state, beside A_log and x_proj

    def dimensions(self, config: MambaConfig) -> Dimensions:
        """Read the sizes out of a transformers configuration."""
        return Dimensions(
            n_layer=config.num_hidden_layers,
            d_model=config.hidden_size,
            d_inner=config.intermediate_size,
            d_state=config.state_size,
            dt_rank=int(config.time_step_rank),
            d_conv=config.conv_kernel,
            vocab_size=config.vocab_size,
        )

    def resized(self, config: MambaConfig, *, n_layer: int, d_inner: int, d_state: int) -> MambaConfig:
        """A configuration of the same family with other sizes, as a model cut to them would have."""
        other = copy.deepcopy(config)
        other.num_hidden_layers, other.intermediate_size, other.state_size = n_layer, d_inner, d_state
        return other

    def expand(self, mixer: nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Apply in_proj: the convolution's input x and the gate z, each (B, L, D)."""
        x, z = mixer.in_proj(hidden).chunk(2, dim=-1)
        return x, z

    def scan_inputs(
        self,
        mixer: nn.Module,
        x: torch.Tensor,
        z: torch.Tensor,
        history: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        fuse: bool = False,
    ) -> ScanInputs:
        """Everything between in_proj and the scan.

        Args:
            mixer: a MambaMixer.
            x: (B, L, D) the convolution's input.
            z: (B, L, D) the gate before silu.
            history: (B, d_conv - 1, D) the inputs that came before x; None stands for zeros.
            attention_mask: (B, L), 0 at padding: padded positions drive no state (as in transformers).
            fuse: use a GPU's kernels: convolution and silu in one, bias and softplus of dt left to the scan.
        """
        u = convolved(mixer, x, history, fuse)
        if attention_mask is not None:
            u = u * attention_mask[:, :, None].to(u.dtype)
        n, r = mixer.ssm_state_size, mixer.time_step_rank
        low_rank, B, C = self.after_x_proj(mixer, *mixer.x_proj(u).split([r, n, n], dim=-1))
        dt, bias = F.linear(low_rank, mixer.dt_proj.weight), mixer.dt_proj.bias
        if not fuse:  # transformers adds the bias in float32 whatever the weights' dtype
            dt, bias = F.softplus(dt.float().add_(bias.float())), None
        return ScanInputs(u=u, dt=dt, A=-torch.exp(mixer.A_log.float()), B=B, C=C, D=mixer.D, z=z, dt_bias=bias)

    def after_x_proj(
        self, mixer: nn.Module, low_rank: torch.Tensor, B: torch.Tensor, C: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What dt_proj and the scan read of what x_proj puts out, (B, L, R) and twice (B, L, N): the same, here."""
        return low_rank, B, C

    def scan(
        self,
        mixer: nn.Module,
        inputs: ScanInputs,
        state: torch.Tensor | None = None,
        backend: str = "auto",
        in_place: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What out_proj reads, (B, L, D), and the state after the last token, (B, D, N)."""
        return selective_scan(inputs, state, backend, in_place)

    def scan_groups(self, mixer: nn.Module, inputs: ScanInputs) -> list[ScanInputs]:
        """All channels read the same B and C."""
        return [inputs]

    def rates(self, mixer: nn.Module) -> list[torch.Tensor]:
        """A_log itself, (D, N)."""
        return [mixer.A_log]

    def gains(self, mixer: nn.Module, group: int, inputs: ScanInputs, states: torch.Tensor) -> None:
        """The gate alone stands between the scan and out_proj."""

    def readers(self, mixer: nn.Module, group: int) -> Readers:
        """C of a Mamba-1 comes straight from x_proj."""
        raise ValueError("a Mamba-1 has no heads")

    def change_skip(self, mixer: nn.Module, group: int, change: torch.Tensor) -> None:
        """The repair of a Mamba-1 folds into x_proj and leaves D alone."""
        raise ValueError("a Mamba-1 has no heads")

    def module_weights(self, mixer: nn.Module) -> dict[str, torch.Tensor]:
        """The weights of the mixer's linear maps by name, (out, in), and of its conv1d, (D, K); views, not copies."""
        weights = {name: getattr(mixer, name).weight.data for name in ("in_proj", "x_proj", "dt_proj", "out_proj")}
        return {**weights, "conv1d": mixer.conv1d.weight.data.squeeze(1)}

    def module_inputs(self, block: nn.Module, hidden: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """What each of these modules reads when the block reads `hidden`, and what the block returns.

        Args:
            block: a MambaBlock.
            hidden: (B, L, d_model).

        Returns:
            Inputs by module name, (B, L, in) or (B, L, D) for conv1d; the block's output (B, L, d_model).
        """
        mixer, normed = self.mixer(block), self.normed(block, hidden)
        x, z = self.expand(mixer, normed)
        inputs = self.scan_inputs(mixer, x, z)
        y, _ = selective_scan(inputs)
        n, r = mixer.ssm_state_size, mixer.time_step_rank
        low_rank, _, _ = self.after_x_proj(mixer, *mixer.x_proj(inputs.u).split([r, n, n], dim=-1))
        read = {"in_proj": normed, "conv1d": x, "x_proj": inputs.u, "dt_proj": low_rank, "out_proj": y}
        return read, self.output(block, hidden, y)

    def remove_ssm(self, block: nn.Module) -> None:
        """Silence the states of a block in place; the convolution, the skip D and the gate stay."""
        self.mask_states(self.mixer(block), kept=[])

    def mask_states(self, mixer: nn.Module, kept: Sequence[int], mixing: torch.Tensor | None = None) -> None:
        """Silence all states but `kept` in place.

        A state whose B row is zero stays zero, one whose C row is zero is never read; both are zeroed, so the masked
        layer computes exactly what the cut one will. The shape and A_log stay as they are.

        Args:
            mixer: a MambaMixer.
            kept: the states that stay, of N.
            mixing: (K, N) matrix M of the repair: the kept states' C rows become M C. None keeps them as they are.
        """
        b_rows, c_rows = self._state_rows(mixer)
        with torch.no_grad():
            weight = mixer.x_proj.weight
            keep = torch.as_tensor(list(kept), device=weight.device, dtype=torch.long)
            dropped = torch.ones(mixer.ssm_state_size, dtype=torch.bool, device=weight.device)
            dropped[keep] = False
            if mixing is not None:
                mixed = mixing.to(weight.device, torch.float64) @ weight[c_rows].double()
                weight[c_rows][keep] = mixed.to(weight.dtype)
            weight[b_rows][dropped] = 0
            weight[c_rows][dropped] = 0

    def is_masked(self, mixer: nn.Module, kept: Sequence[int]) -> bool:
        """Whether every state outside `kept` has zero B and C rows, so that cutting it changes nothing."""
        dropped = sorted(set(range(mixer.ssm_state_size)) - set(kept))
        return all(not mixer.x_proj.weight[rows][dropped].any() for rows in self._state_rows(mixer))

    def cut_states(
        self, tensors: Mapping[str, torch.Tensor], config: MambaConfig, kept: Sequence[Sequence[int]]
    ) -> tuple[dict[str, torch.Tensor], MambaConfig, list[Cut]]:
        """Remove all states but `kept[layer]` from a whole state dict and its configuration.

        transformers and mamba_ssm have one `d_state` for all layers: the configuration says the largest number, and
        only if all layers keep as many can they load the result.
        """
        sizes, out, cuts = self.dimensions(config), dict(tensors), []
        n, r = sizes.d_state, sizes.dt_rank
        for layer, states in enumerate(kept):
            prefix = self.mixer_prefix(layer)
            if prefix + "A_log" not in tensors:  # a layer of another kind
                continue
            keep = torch.as_tensor(list(states))
            rows = torch.cat([torch.arange(r), r + keep, r + n + keep])
            plan = {"A_log": (1, keep), "x_proj.weight": (0, rows), **dict.fromkeys(self.by_state, (0, keep))}
            cut_tensors(out, cuts, {prefix + name: how for name, how in plan.items()})
        most = max(map(len, kept))
        return out, self.with_states(config, most), cuts

    def mask_channels(self, mixer: nn.Module, kept: Sequence[int]) -> None:
        """Silence all channels but `kept` in place.

        A channel whose columns of x_proj and out_proj are zero is read by nobody, which is enough; its rows of the
        other tensors are zeroed too, so that the file shows what is gone. A_log stays.

        Args:
            mixer: a MambaMixer.
            kept: the channels that stay, of D.
        """
        dropped = sorted(set(range(mixer.intermediate_size)) - set(kept))
        silence(mixer, _channel_indices(mixer, dropped))

    def narrowed(self, block: nn.Module, kept: Sequence[int]) -> nn.Module:
        """A copy of a block with some of its channels only, for `normed`, `scanned` and a forward with the fast scan.

        Args:
            block: a MambaBlock.
            kept: the channels the copy has, of D.
        """
        narrow = copy.deepcopy(block)
        for name, (axis, index) in _channel_indices(narrow.mixer, kept).items():
            parent, _, leaf = name.rpartition(".")
            tensor = narrow.mixer.get_parameter(name).detach().index_select(axis, index)
            setattr(narrow.mixer.get_submodule(parent), leaf, nn.Parameter(tensor, requires_grad=False))
        narrow.mixer.intermediate_size = len(kept)
        return narrow

    def widen(self, block: nn.Module, narrow: nn.Module, kept: Sequence[int]) -> None:
        """Write the weights of a block made by `narrowed` back to their places in `block`, and silence the rest."""
        with torch.no_grad():
            for name, (axis, index) in _channel_indices(block.mixer, kept).items():
                block.mixer.get_parameter(name).index_copy_(axis, index, narrow.mixer.get_parameter(name))
        self.mask_channels(block.mixer, kept)

    def are_channels_masked(self, mixer: nn.Module, kept: Sequence[int]) -> bool:
        """Whether every channel outside `kept` has zero columns in x_proj and out_proj: nobody reads it."""
        dropped = sorted(set(range(mixer.intermediate_size)) - set(kept))
        return not any(bool(proj.weight[:, dropped].any()) for proj in (mixer.x_proj, mixer.out_proj))

    def cut_channels(
        self, tensors: Mapping[str, torch.Tensor], config: MambaConfig, kept: Sequence[Sequence[int]]
    ) -> tuple[dict[str, torch.Tensor], MambaConfig, list[Cut]]:
        """Remove all channels but `kept[layer]` from a whole state dict and its configuration.

        The configuration says the largest number, as for states; `expand` stays, which transformers wants whole and
        does not look at when `intermediate_size` is there.
        """
        out, cuts = dict(tensors), []
        for layer, channels in enumerate(kept):
            keep = torch.as_tensor(list(channels))
            halves = torch.cat([keep, config.intermediate_size + keep])  # of in_proj: x, then z
            prefix = self.mixer_prefix(layer)
            plan = {
                prefix + name: (axis, halves if name.startswith("in_proj") else keep)
                for name, axis in _CHANNEL_AXES.items()
                if prefix + name in tensors  # biases are optional
            }
            cut_tensors(out, cuts, plan)
        smaller = copy.deepcopy(config)
        smaller.intermediate_size = max(map(len, kept))
        return out, smaller, cuts

    @staticmethod
    def _state_rows(mixer: nn.Module) -> tuple[slice, slice]:
        """The B rows and the C rows of x_proj."""
        n, r = mixer.ssm_state_size, mixer.time_step_rank
        return slice(r, r + n), slice(r + n, r + 2 * n)


def convolved(
    mixer: nn.Module, x: torch.Tensor, history: torch.Tensor | None = None, fuse: bool = False
) -> torch.Tensor:
    """The activated convolution of (B, L, D) behind `history` (B, d_conv - 1, D), on a GPU in one kernel if `fuse`."""
    weight, bias = mixer.conv1d.weight, mixer.conv1d.bias
    if fuse and mixer.activation in ("silu", "swish"):
        from ssmc.runtime.scan.gpu import causal_conv_silu  # imports triton, which is there when the scan runs on a GPU

        return causal_conv_silu(x, weight, bias, history)
    return mixer.act(causal_conv(x, weight, bias, history))


def _channel_indices(mixer: nn.Module, channels: Sequence[int]) -> dict[str, tuple[int, torch.Tensor]]:
    """Where a mixer's parameters have some channels: name -> axis, indices. Biases are optional."""
    index = torch.as_tensor(list(channels), dtype=torch.long, device=mixer.D.device)
    twice = torch.cat([index, mixer.intermediate_size + index])
    names = [name for name, _ in mixer.named_parameters() if name in _CHANNEL_AXES]
    return {name: (_CHANNEL_AXES[name], twice if name.startswith("in_proj") else index) for name in names}
