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

from ssmc.runtime.models.families.backbone import BackboneArchitecture, cut_tensors, silence
from ssmc.runtime.models.families.base import Cut, Dimensions, Readers
from ssmc.runtime.models.families.mamba import convolved
from ssmc.runtime.scan import ScanInputs, SsdInputs, accelerator, ssd_scan


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
    has_gpu_scan = True
    has_gpu_gradients = True
    has_gpu_sums = False

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
        """A configuration of the same family with other sizes; d_inner is whole heads and a whole `expand`.

        Raises:
            ValueError: a d_inner that transformers cannot load.
        """
        if d_inner % config.hidden_size or d_inner % (config.head_dim * config.n_groups):
            raise ValueError("a Mamba-2 of this d_inner cannot be loaded by transformers")
        other = copy.deepcopy(config)
        other.expand, other.num_heads = d_inner // config.hidden_size, d_inner // config.head_dim
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
        fuse: bool = False,
    ) -> SsdInputs:
        """Everything between in_proj and the scan.

        Args:
            mixer: a Mamba2Mixer.
            x: (B, L, D + 2 G N) the convolution's input.
            z: the gate before silu and dt before its bias, as `expand` returns them.
            history: (B, d_conv - 1, D + 2 G N) the inputs that came before x; None stands for zeros.
            attention_mask: (B, L), 0 at padding: padded positions drive no state (as in transformers).
            fuse: use a GPU's kernels: convolution and silu in one, bias, softplus and limits of dt left to the scan.
        """
        gate, dt = z
        u = convolved(mixer, x, history, fuse)
        if attention_mask is not None:
            u = u * attention_mask[:, :, None].to(u.dtype)
        n, g = mixer.ssm_state_size, mixer.n_groups
        u, B, C = u.split([mixer.intermediate_size, g * n, g * n], dim=-1)
        inputs = SsdInputs(
            u=u,
            dt=dt,
            A=-torch.exp(mixer.A_log.float()),
            B=B.unflatten(2, (g, n)),
            C=C.unflatten(2, (g, n)),
            D=mixer.D,
            z=gate,
            dt_bias=mixer.dt_bias,
            dt_limit=mixer.time_step_limit,
        )
        return inputs if fuse else inputs.with_time_steps()

    def scan(
        self,
        mixer: nn.Module,
        inputs: SsdInputs,
        state: torch.Tensor | None = None,
        backend: str = "auto",
        in_place: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What out_proj reads, (B, L, D), and the state after the last token, (B, H, P, N)."""
        y, state = ssd_scan(inputs, state, backend, in_place)
        return self.gated(mixer, y, inputs.z, backend), state

    def gated(self, mixer: nn.Module, y: torch.Tensor, z: torch.Tensor, backend: str = "auto") -> torch.Tensor:
        """What out_proj reads of the scan's output and the gate before silu, (B, L, D) each."""
        kernels = accelerator(backend, [y, z, mixer.norm.weight])
        if kernels is None:
            return mixer.norm(y, z)
        groups, gate_first = self.norm_form(mixer)
        return kernels.gated_norm(y, z, mixer.norm.weight, groups, mixer.norm.variance_epsilon, gate_first)

    def norm_form(self, mixer: nn.Module) -> tuple[int, bool]:
        """Of how many groups of channels the gated norm takes the mean square, and whether the gate comes first."""
        return mixer.intermediate_size // mixer.norm.group_size, True

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
        return out, self.with_states(config, most), cuts

    def mask_channels(self, mixer: nn.Module, kept: Sequence[int]) -> None:
        """Silence all channels but `kept`, which are whole heads, in place.

        A silent channel's u and z are zero, so the gated norm's sum of squares does not feel it. A_log stays.

        Args:
            mixer: a Mamba2Mixer.
            kept: the channels that stay, of D.
        """
        dropped = sorted(set(range(mixer.intermediate_size)) - set(kept))
        silence(mixer, _own_indices(mixer, dropped))

    def narrowed(self, block: nn.Module, kept: Sequence[int]) -> nn.Module:
        """A copy of a block with some of its heads only, as `cut_channels` makes it.

        Its gated norm takes the mean over fewer channels, for which its weight makes up; see `_norm_factor`.

        Args:
            block: a Mamba2Block.
            kept: the channels of these heads, as many in each group.
        """
        narrow = copy.deepcopy(block)
        mixer = narrow.mixer
        for name, (axis, index) in _kept_indices(mixer, kept).items():
            parent, _, leaf = name.rpartition(".")
            tensor = mixer.get_parameter(name).detach().index_select(axis, index)
            setattr(mixer.get_submodule(parent), leaf, nn.Parameter(tensor, requires_grad=False))
        mixer.norm.weight.data *= _norm_factor(mixer.intermediate_size, len(kept))
        mixer.intermediate_size, mixer.num_heads = len(kept), len(kept) // mixer.head_dim
        mixer.conv_dim = len(kept) + 2 * mixer.n_groups * mixer.ssm_state_size
        mixer.norm.group_size = len(kept) // mixer.n_groups
        return narrow

    def widen(self, block: nn.Module, narrow: nn.Module, kept: Sequence[int]) -> None:
        """Write the weights of a block made by `narrowed` back to their places in `block`, and silence the rest."""
        with torch.no_grad():
            for name, (axis, index) in _kept_indices(block.mixer, kept).items():
                tensor = narrow.mixer.get_parameter(name)
                if name == "norm.weight":
                    tensor = tensor / _norm_factor(block.mixer.intermediate_size, len(kept))
                block.mixer.get_parameter(name).index_copy_(axis, index, tensor)
        self.mask_channels(block.mixer, kept)

    def are_channels_masked(self, mixer: nn.Module, kept: Sequence[int]) -> bool:
        """Whether the channels outside `kept` put nothing into the gated norm and nobody reads them."""
        dropped = sorted(set(range(mixer.intermediate_size)) - set(kept))
        conv = mixer.conv1d  # without it u is zero, and so are the states and the skip of these heads
        silent = [conv.weight[dropped], mixer.out_proj.weight[:, dropped]]
        silent += [] if conv.bias is None else [conv.bias[dropped]]
        return not any(bool(tensor.any()) for tensor in silent)

    def cut_channels(
        self, tensors: Mapping[str, torch.Tensor], config: Mamba2Config, kept: Sequence[Sequence[int]]
    ) -> tuple[dict[str, torch.Tensor], Mamba2Config, list[Cut]]:
        """Remove all heads but those of `kept[layer]` from a whole state dict and its configuration.

        The weight of the gated norm makes up for its mean over fewer channels, in float32 whatever it was: the factor
        is no number of half precision.
        """
        sizes = self.dimensions(config)
        out, cuts, width = dict(tensors), [], max(map(len, kept))
        for layer, channels in enumerate(kept):
            prefix = self.mixer_prefix(layer)
            rest = 2 * sizes.n_groups * sizes.d_state  # rows of B and C
            plan = _indices(sizes.d_inner, sizes.head_dim, rest, channels)
            cut_tensors(out, cuts, {prefix + name: where for name, where in plan.items() if prefix + name in tensors})
            norm = prefix + "norm.weight"
            out[norm] = out[norm].float() * _norm_factor(sizes.d_inner, width)
        smaller = copy.deepcopy(config)
        smaller.expand, smaller.num_heads = width // sizes.d_model, width // sizes.head_dim
        return out, smaller, cuts

    def with_epsilons_of(self, model: nn.Module, config: Mamba2Config) -> None:
        """Make gated norms over all channels, some silent, compute what those of a cut model compute.

        w f y / sqrt(S / D' + eps) with f = sqrt(D / D') is w y / sqrt(S / D + eps D' / D), S the sum of squares. The
        difference that is left is of the order of eps, 1e-5; no loader has an epsilon for these norms alone.
        """
        whole, width = self.dimensions(model.config).d_inner, self.dimensions(config).d_inner
        for block in self.blocks(model):
            block.mixer.norm.variance_epsilon *= width / whole

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


def _norm_factor(whole: int, width: int) -> float:
    """What the gated norm's weight is multiplied by when its mean is over `width` channels and the rest are silent."""
    return (whole / width) ** 0.5


def _own_indices(mixer: nn.Module, channels: Sequence[int]) -> dict[str, tuple[int, torch.Tensor]]:
    """Where a mixer's parameters have some channels, whole heads, and nothing else: name -> axis, indices."""
    return _present(mixer, _indices(mixer.intermediate_size, mixer.head_dim, 0, channels, mixer.conv_dim))


def _kept_indices(mixer: nn.Module, channels: Sequence[int]) -> dict[str, tuple[int, torch.Tensor]]:
    """The same, with the rows of B and C, which all heads of a group share."""
    rest = 2 * mixer.n_groups * mixer.ssm_state_size
    return _present(mixer, _indices(mixer.intermediate_size, mixer.head_dim, rest, channels))


def _present(mixer: nn.Module, plan: Mapping[str, tuple[int, torch.Tensor]]) -> dict[str, tuple[int, torch.Tensor]]:
    """Of the parameters there are (biases are optional), on their device."""
    names = {name for name, _ in mixer.named_parameters()}
    return {name: (axis, index.to(mixer.D.device)) for name, (axis, index) in plan.items() if name in names}


def _indices(
    d_inner: int, head_dim: int, rest: int, channels: Sequence[int], conv_dim: int | None = None
) -> dict[str, tuple[int, torch.Tensor]]:
    """Which entries of every tensor of a mixer belong to some channels: name -> axis, indices, ascending.

    Args:
        d_inner: D of the mixer.
        head_dim: P; the channels are whole heads.
        rest: how many rows of B and C follow the channels and are listed too, 0 for none.
        channels: of D.
        conv_dim: channels of conv1d, D + 2 G N; None: D + `rest`.
    """
    own = torch.as_tensor(list(channels), dtype=torch.long)
    heads = own[::head_dim] // head_dim
    convolved = torch.cat([own, d_inner + torch.arange(rest)])  # x, B, C
    rows = torch.cat(
        [own, d_inner + convolved, d_inner + (conv_dim or d_inner + rest) + heads]
    )  # z, then these, then dt
    by_channel, by_head = (0, own), (0, heads)
    plan = {"in_proj.weight": (0, rows), "in_proj.bias": (0, rows), "conv1d.weight": (0, convolved)}
    plan |= {"conv1d.bias": (0, convolved), "norm.weight": by_channel, "out_proj.weight": (1, own)}
    return plan | {"A_log": by_head, "D": by_head, "dt_bias": by_head}
