"""The mathematics and the surgery of Mamba-2, for all families whose mixers are made so.

in_proj puts out, in this order: the gate z (D), the convolution's input x (D), B (G N) and C (G N), and dt (H). x, B
and C all pass conv1d and silu. The state dimension N appears in the B and C rows of in_proj and in the same channels of
conv1d, once for each of the G groups; A_log, D and dt_bias have one number a head.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ssmc.runtime.later import F, nn, torch
from ssmc.runtime.models.architectures.capabilities import Otherwise
from ssmc.runtime.models.architectures.convolution import Convolution, Window
from ssmc.runtime.models.architectures.dimensions import Mamba2Dimensions
from ssmc.runtime.models.architectures.interface import Readers
from ssmc.runtime.models.architectures.plan import CHANNEL, HEAD, MODEL, STATE, Plan, Selection
from ssmc.runtime.models.architectures.surgery import PlannedSurgery, Sizes
from ssmc.runtime.scan import ScanInputs, SsdInputs, SsdMoments, accelerator, ssd_moments, ssd_scan
from ssmc.runtime.scan.inputs import decay_rates
from ssmc.runtime.scan.rounding import StateFormat

_EXPANDED = (CHANNEL, CHANNEL, STATE, STATE, HEAD)  # z, x, B, C, dt
_CONVOLVED = (CHANNEL, STATE, STATE)  # x, B, C
NO_LIMITS = (0.0, math.inf)  # of time steps

PLAN = Plan(
    tensors={
        "in_proj.weight": (_EXPANDED, (MODEL,)),
        "in_proj.bias": (_EXPANDED,),
        "conv1d.weight": (_CONVOLVED, (), ()),
        "conv1d.bias": (_CONVOLVED,),
        "norm.weight": ((CHANNEL,),),
        "out_proj.weight": ((MODEL,), (CHANNEL,)),
        "out_proj.bias": ((MODEL,),),
        "A_log": ((HEAD,),),
        "D": ((HEAD,),),
        "dt_bias": ((HEAD,),),
    },
    # B and C pass conv1d and silu, and silu(bias) is not zero: a state is silent when its rows of in_proj and its
    # channels of conv1d, biases included, are all zero. A channel without conv1d has u zero, and so its states and its
    # skip; the sum of squares of the gated norm does not feel it.
    silent={
        STATE: ("in_proj.weight", "in_proj.bias", "conv1d.weight", "conv1d.bias"),
        CHANNEL: ("conv1d.weight", "conv1d.bias", "out_proj.weight"),
    },
    constant=("A_log",),
)


class Mamba2(Convolution, PlannedSurgery):
    """A mixer of Mamba-2; see `interface` for what each method promises."""

    plan = PLAN
    projections = ("in_proj", "out_proj")
    state_field = "state_size"  # of the configuration
    without_limits: Sequence[str] = ("vllm",)  # software that does not limit time steps

    def dimensions(self, config: Any) -> Mamba2Dimensions:
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

    def time_step_limits(self, config: Any) -> tuple[float, float]:
        """The least and the largest time step that transformers has."""
        low, high = getattr(config, "time_step_limit", None) or NO_LIMITS
        return low, high

    def otherwise(self, config: Any) -> Sequence[Otherwise]:
        """Limits of time steps: transformers' step for a single token has none, whatever its prefill did."""
        low, high = self.time_step_limits(config)
        if (low, high) == NO_LIMITS:
            return ()
        limits = f"time steps to {low:g} at least" + (f" and {high:g} at most" if math.isfinite(high) else "")
        found = [Otherwise("transformers", f"it limits {limits} in prompts, not token by token")]
        return found + [Otherwise(name, f"it does not limit {limits}") for name in self.without_limits]

    def resized(self, config: Any, *, n_layer: int, d_inner: int, d_state: int) -> Any:
        """A configuration of the same family with other sizes; d_inner has a whole `expand`.

        Fewer heads make it, as many in every group; where they would not be whole, fewer channels in each head.

        Raises:
            ValueError: a d_inner that transformers cannot load.
        """
        heads, rest = divmod(d_inner, config.head_dim * config.n_groups)
        if d_inner % config.hidden_size or (rest and d_inner % config.num_heads):
            raise ValueError("a Mamba-2 of this d_inner cannot be loaded by transformers")
        other = copy.deepcopy(config)
        other.expand = d_inner // config.hidden_size
        if rest:
            other.head_dim = d_inner // config.num_heads
        else:
            other.num_heads = heads * config.n_groups
        other.num_hidden_layers, other.state_size = n_layer, d_state
        return other

    def with_d_model(self, config: Any, count: int) -> Any:
        """A configuration whose residual stream has `count` coordinates and whose mixers are as wide as they are."""
        sizes, other = self.dimensions(config), copy.deepcopy(config)
        other.hidden_size = count
        return self.with_heads(other, sizes.dt_rank, sizes.head_dim)

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
        history: torch.Tensor | Window | None = None,
        attention_mask: torch.Tensor | None = None,
        fused: bool = False,
    ) -> SsdInputs:
        """Everything between in_proj and the scan.

        Args:
            mixer: a Mamba2Mixer.
            x: (B, L, D + 2 G N) the convolution's input.
            z: the gate before silu and dt before its bias, as `expand` returns them.
            history: (B, d_conv - 1, D + 2 G N) the inputs that came before x, or see `convolve`; None stands for zeros.
            attention_mask: (B, L), 0 at padding: padded positions drive no state (as in transformers).
            fused: use a GPU's kernels: convolution and silu in one, bias, softplus and limits of dt left to the scan,
                and behind a window -exp(A_log) too.
        """
        gate, dt = z
        u = self.convolve(mixer, x, history, fused)
        if attention_mask is not None:
            u = u * attention_mask[:, :, None].to(u.dtype)
        n, g = mixer.ssm_state_size, mixer.n_groups
        u, B, C = u.split([mixer.intermediate_size, g * n, g * n], dim=-1)
        one_more = isinstance(history, Window)
        inputs = SsdInputs(
            u=u,
            dt=dt,
            A=mixer.A_log if one_more else decay_rates(mixer.A_log, fused),
            B=B.unflatten(2, (g, n)),
            C=C.unflatten(2, (g, n)),
            D=mixer.D,
            z=gate,
            dt_bias=mixer.dt_bias,
            dt_limit=mixer.time_step_limit,
            A_log=mixer.A_log if one_more else None,
        )
        return inputs if fused else inputs.with_time_steps()

    def scan(
        self,
        mixer: nn.Module,
        inputs: SsdInputs,
        state: torch.Tensor | None = None,
        backend: str = "auto",
        in_place: bool = False,
        rounding: StateFormat | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What out_proj reads, (B, L, D), and the state after the last token, (B, H, P, N)."""
        y, state = ssd_scan(inputs, state, backend, in_place, rounding)
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
        group_size = getattr(mixer.norm, "group_size", mixer.intermediate_size)  # transformers before 5.2x has none
        return mixer.intermediate_size // group_size, not getattr(mixer.norm, "norm_before_gate", False)

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
                    A=decay_rates(A_log),
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
        y = (inputs.C.float()[:, :, None] @ states).squeeze(2) + inputs.D.float() * inputs.u.float()  # (B, L, D)
        return self.gains_of(mixer, group, y, inputs.z)

    def gains_of(self, mixer: nn.Module, group: int, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """The same from a group's read-out, skip included, and its gate before silu, (B, L, D / G) each."""
        gate = F.silu(z.float())
        scale = torch.rsqrt((y * gate).square().mean(-1, keepdim=True) + mixer.norm.variance_epsilon)
        return gate * scale * mixer.norm.weight.float().chunk(mixer.n_groups)[group]

    def moments(
        self,
        mixer: nn.Module,
        inputs: SsdInputs,
        group: int,
        backend: str = "auto",
        weights: torch.Tensor | None = None,
    ) -> SsdMoments:
        """Sums over the states of a group, by a kernel for a GPU; all sums with gains in them are weighed."""
        heads, channels = (slice(group * n, (group + 1) * n) for n in _per_group(inputs))
        inputs = replace(
            inputs,
            u=inputs.u[..., channels],
            dt=inputs.dt[..., heads],
            A=inputs.A[heads],
            B=inputs.B[:, :, group : group + 1],
            C=inputs.C[:, :, group : group + 1],
            D=inputs.D[heads],
            z=None if inputs.z is None else inputs.z[..., channels],
            dt_bias=None if inputs.dt_bias is None else inputs.dt_bias[heads],
        )
        y, _ = ssd_scan(inputs, backend=backend)
        gains = self.gains_of(mixer, group, y.float(), inputs.z)
        if weights is not None:
            gains = gains * weights.sqrt()[..., None]
        return ssd_moments(inputs, gains, backend=backend)

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
        weights = {name: getattr(mixer, name).weight.data for name in self.projections}
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

    def scanned(self, block: nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the scan and out_proj read when the block reads `hidden`: u, and y with its gate, each (B, L, D)."""
        mixer = self.mixer(block)
        inputs = self.scan_inputs(mixer, *self.expand(mixer, self.normed(block, hidden)))
        y, _ = self.scan(mixer, inputs)
        return inputs.u, y

    def read_by_in_proj(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """What the C rows of in_proj multiply when the block reads `hidden`, multipliers of their output included."""
        return self.normed(block, hidden)

    def remove_ssm(self, block: nn.Module) -> None:
        """Silence the states of a block in place; the convolution, the skip D, the gate and the norm stay."""
        self.mask_states(self.mixer(block), kept=[])

    def mask_states(self, mixer: nn.Module, kept: Sequence[int], mixing: torch.Tensor | None = None) -> None:
        """Silence all states but `kept` in place.

        Args:
            mixer: a Mamba2Mixer.
            kept: the states that stay, of G N: state n of group g is number g N + n.
            mixing: not for Mamba-2, where a mixture of C rows does not pass conv1d and silu.
        """
        if mixing is not None:
            raise ValueError("a mixing matrix does not fold into a Mamba-2: B and C pass conv1d and silu")
        self.mask(mixer, STATE, kept)

    def selection(self, dimension: str, numbers: Sequence[int], sizes: Sizes) -> Selection:
        """These numbers of a dimension, and with channels the heads that have any of them."""
        chosen = super().selection(dimension, numbers, sizes)
        if dimension == CHANNEL:
            head_dim = sizes[CHANNEL] // sizes[HEAD]
            chosen = {CHANNEL: chosen[CHANNEL], HEAD: (chosen[CHANNEL] // head_dim).unique()}
        return chosen

    def dropped(self, dimension: str, kept: Sequence[int], sizes: Sizes) -> Selection:
        """What goes; a head only when all of its channels do."""
        goes = dict(super().dropped(dimension, kept, sizes))
        if dimension == CHANNEL:
            stay = self.selection(CHANNEL, kept, sizes)[HEAD].tolist()
            goes[HEAD] = torch.as_tensor([head for head in range(sizes[HEAD]) if head not in stay], dtype=torch.long)
        return goes

    def with_kept(self, config: Any, dimension: str, kept: Sequence[int]) -> Any:
        """A configuration whose mixers have what was kept: fewer heads, or fewer channels in each, or both."""
        if dimension != CHANNEL:
            return super().with_kept(config, dimension, kept)
        heads = len({channel // self.dimensions(config).head_dim for channel in kept})
        return self.with_heads(config, heads, len(kept) // heads)

    def with_size(self, config: Any, dimension: str, count: int) -> Any:
        """A configuration whose mixers have `count` states over all groups, or channels, and all else the same."""
        sizes = self.dimensions(config)
        if dimension == CHANNEL:
            return self.with_heads(config, count // sizes.head_dim, sizes.head_dim)
        other = copy.deepcopy(config)
        # every group of a layer keeps the same number: its B and C are one block of in_proj
        setattr(other, self.state_field, count // sizes.n_groups)
        return other

    def with_heads(self, config: Any, heads: int, head_dim: int) -> Any:
        """A configuration whose mixers have so many heads of so many channels."""
        other, width, d_model = copy.deepcopy(config), heads * head_dim, config.hidden_size
        other.num_heads, other.head_dim = heads, head_dim
        whole, rest = divmod(width, d_model)
        # transformers takes whole numbers only, and checks them; other software takes any number of heads
        object.__setattr__(other, "expand", whole if not rest else exact_ratio(width, d_model))
        return other

    def after_cut(
        self, tensors: dict[str, torch.Tensor], prefix: str, dimension: str, sizes: Sizes, left: tuple[int, int]
    ) -> None:
        """The weight of the gated norm makes up for its mean over fewer channels.

        It is stored in float32 then, whatever it was: the factor is no number of half precision.
        """
        norm = prefix + "norm.weight"
        if dimension == CHANNEL and norm in tensors:
            tensors[norm] = tensors[norm].float() * _norm_factor(sizes[CHANNEL], left[1])

    def after_narrow(self, mixer: nn.Module, dimension: str, sizes: Sizes, left: int) -> None:
        """The gated norm takes the mean over fewer channels, for which its weight makes up; see `_norm_factor`."""
        if dimension == CHANNEL:
            mixer.intermediate_size, mixer.num_heads = left, len(mixer.A_log)
            mixer.head_dim = left // mixer.num_heads
            if hasattr(mixer.norm, "weight"):
                mixer.norm.weight.data *= _norm_factor(sizes[CHANNEL], left)
                mixer.norm.group_size = left // mixer.n_groups
        else:
            mixer.ssm_state_size = left // mixer.n_groups
        mixer.conv_dim = mixer.intermediate_size + 2 * mixer.n_groups * mixer.ssm_state_size

    def before_widen(
        self, tensors: Mapping[str, torch.Tensor], dimension: str, sizes: Sizes, left: int
    ) -> Mapping[str, torch.Tensor]:
        """The weight of the gated norm without the factor."""
        if dimension != CHANNEL or "norm.weight" not in tensors:
            return tensors
        return {**tensors, "norm.weight": tensors["norm.weight"] / _norm_factor(sizes[CHANNEL], left)}

    def with_epsilons_of(self, model: nn.Module, config: Any) -> None:
        """Make gated norms over all channels, some silent, compute what those of a cut model compute.

        w f y / sqrt(S / D' + eps) with f = sqrt(D / D') is w y / sqrt(S / D + eps D' / D), S the sum of squares. The
        difference that is left is of the order of eps, 1e-5; no loader has an epsilon for these norms alone.
        """
        whole, width = self.dimensions(model.config).d_inner, self.dimensions(config).d_inner
        for block in self.blocks(model):
            mixer = self.mixer(block)
            if mixer is not None and hasattr(mixer.norm, "variance_epsilon"):
                mixer.norm.variance_epsilon *= width / whole


def exact_ratio(d_inner: int, d_model: int) -> float:
    """The number for which int(ratio * d_model) is d_inner, though floating point rounds."""
    ratio = d_inner / d_model
    while int(ratio * d_model) < d_inner:
        ratio = math.nextafter(ratio, math.inf)
    return ratio


def _norm_factor(whole: int, width: int) -> float:
    """What the gated norm's weight is multiplied by when its mean is over `width` channels and the rest are silent."""
    return (whole / width) ** 0.5


def _per_group(inputs: SsdInputs) -> tuple[int, int]:
    """Heads and channels of a group."""
    return inputs.heads // inputs.groups, inputs.d_inner // inputs.groups
