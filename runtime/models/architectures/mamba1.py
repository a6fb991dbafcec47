"""The mathematics and the surgery of Mamba-1, for all families whose mixers are made so."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ssmc.runtime.later import F, nn, torch
from ssmc.runtime.models.architectures.capabilities import Otherwise
from ssmc.runtime.models.architectures.convolution import Convolution, Window, is_wrapped
from ssmc.runtime.models.architectures.dimensions import Dimensions
from ssmc.runtime.models.architectures.plan import CHANNEL, MODEL, RANK, STATE, Plan
from ssmc.runtime.models.architectures.surgery import PlannedSurgery, Sizes
from ssmc.runtime.scan import Moments, ScanInputs, scan_moments, selective_scan
from ssmc.runtime.scan.inputs import decay_rates
from ssmc.runtime.scan.rounding import StateFormat

PLAN = Plan(
    tensors={
        "in_proj.weight": ((CHANNEL, CHANNEL), (MODEL,)),  # x, then z
        "in_proj.bias": ((CHANNEL, CHANNEL),),
        "conv1d.weight": ((CHANNEL,), (), ()),
        "conv1d.bias": ((CHANNEL,),),
        "x_proj.weight": ((RANK, STATE, STATE), (CHANNEL,)),  # dt, B, C
        "x_proj.bias": ((RANK, STATE, STATE),),  # no stock mixer has one
        "dt_proj.weight": ((CHANNEL,), (RANK,)),
        "dt_proj.bias": ((CHANNEL,),),
        "A_log": ((CHANNEL,), (STATE,)),
        "D": ((CHANNEL,),),
        "out_proj.weight": ((MODEL,), (CHANNEL,)),
        "out_proj.bias": ((MODEL,),),
    },
    # A state whose B row is zero stays zero, one whose C row is zero is never read. A channel whose columns of x_proj
    # and out_proj are zero is read by nobody; its other rows are zeroed so that the file shows what is gone.
    silent={STATE: ("x_proj.weight", "x_proj.bias"), CHANNEL: ("x_proj.weight", "out_proj.weight")},
    constant=("A_log",),
    listed_first={STATE: "A_log"},
)


class Mamba1(Convolution, PlannedSurgery):
    """A mixer of Mamba-1; see `interface` for what each method promises."""

    plan = PLAN
    projections = ("in_proj", "x_proj", "dt_proj", "out_proj")
    state_field = "state_size"  # of the configuration

    def dimensions(self, config: Any) -> Dimensions:
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

    def otherwise(self, config: Any) -> Sequence[Otherwise]:
        """Nothing."""
        return ()

    def resized(self, config: Any, *, n_layer: int, d_inner: int, d_state: int) -> Any:
        """A configuration of the same family with other sizes, as a model cut to them would have."""
        other = copy.deepcopy(config)
        other.num_hidden_layers, other.intermediate_size, other.state_size = n_layer, d_inner, d_state
        return other

    def with_d_model(self, config: Any, count: int) -> Any:
        """A configuration whose residual stream has `count` coordinates; `expand` follows where it can."""
        other = copy.deepcopy(config)
        other.hidden_size = count
        whole, rest = divmod(config.intermediate_size, count)
        if not rest:
            other.expand = whole
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
        history: torch.Tensor | Window | None = None,
        attention_mask: torch.Tensor | None = None,
        fused: bool = False,
    ) -> ScanInputs:
        """Everything between in_proj and the scan.

        Args:
            mixer: a MambaMixer.
            x: (B, L, D) the convolution's input.
            z: (B, L, D) the gate before silu.
            history: (B, d_conv - 1, D) the inputs that came before x, or see `convolve`; None stands for zeros.
            attention_mask: (B, L), 0 at padding: padded positions drive no state (as in transformers).
            fused: use a GPU's kernels: convolution and silu in one, bias and softplus of dt left to the scan, and
                behind a window -exp(A_log) too.
        """
        u = self.convolve(mixer, x, history, fused)
        if attention_mask is not None:
            u = u * attention_mask[:, :, None].to(u.dtype)
        n, r = mixer.ssm_state_size, mixer.time_step_rank
        low_rank, B, C = self.after_x_proj(mixer, *mixer.x_proj(u).split([r, n, n], dim=-1))
        dt, bias = self.time_step(mixer, low_rank, fused)
        one_more = isinstance(history, Window)  # for which a kernel of its own is longer than all it does
        A = mixer.A_log if one_more else decay_rates(mixer.A_log, fused)
        return ScanInputs(
            u=u, dt=dt, A=A, B=B, C=C, D=mixer.D, z=z, dt_bias=bias, A_log=mixer.A_log if one_more else None
        )

    def time_step(
        self, mixer: nn.Module, low_rank: torch.Tensor, fused: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """dt (B, L, D) of what dt_proj reads, and the bias that is not in it yet; then softplus is not, either."""
        if is_wrapped(mixer.dt_proj):  # an adapter: its weight alone is not what it computes
            return F.softplus(mixer.dt_proj(low_rank).float()), None
        dt, bias = F.linear(low_rank, mixer.dt_proj.weight), mixer.dt_proj.bias
        if fused:
            return dt, bias
        return F.softplus(dt.float().add_(bias.float())), None  # transformers adds in float32 whatever the dtype

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
        rounding: StateFormat | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What out_proj reads, (B, L, D), and the state after the last token, (B, D, N)."""
        return selective_scan(inputs, state, backend, in_place, rounding)

    def scan_groups(self, mixer: nn.Module, inputs: ScanInputs) -> list[ScanInputs]:
        """All channels read the same B and C."""
        return [inputs]

    def rates(self, mixer: nn.Module) -> list[torch.Tensor]:
        """A_log itself, (D, N)."""
        return [mixer.A_log]

    def moments(
        self,
        mixer: nn.Module,
        inputs: ScanInputs,
        group: int,
        backend: str = "auto",
        weights: torch.Tensor | None = None,
    ) -> Moments:
        """Sums over the states, by a kernel for a GPU; all sums with C in them are weighed."""
        if weights is not None:
            inputs = replace(inputs, C=(inputs.C.float() * weights.sqrt()[..., None]).to(inputs.C.dtype))
        return scan_moments(inputs, backend=backend)

    def gains(self, mixer: nn.Module, group: int, inputs: ScanInputs, states: torch.Tensor) -> None:
        """The gate alone stands between the scan and out_proj."""

    def module_weights(self, mixer: nn.Module) -> dict[str, torch.Tensor]:
        """The weights of the mixer's linear maps by name, (out, in), and of its conv1d, (D, K); views, not copies."""
        weights = {name: getattr(mixer, name).weight.data for name in self.projections}
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

    def scanned(self, block: nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the scan and out_proj read when the block reads `hidden`: u, and y with its gate, each (B, L, D)."""
        mixer = self.mixer(block)
        inputs = self.scan_inputs(mixer, *self.expand(mixer, self.normed(block, hidden)))
        y, _ = self.scan(mixer, inputs)
        return inputs.u, y

    def remove_ssm(self, block: nn.Module) -> None:
        """Silence the states of a block in place; the convolution, the skip D and the gate stay."""
        self.mask_states(self.mixer(block), kept=[])

    def mask_states(self, mixer: nn.Module, kept: Sequence[int], mixing: torch.Tensor | None = None) -> None:
        """Silence all states but `kept` in place; A_log stays as it is.

        Args:
            mixer: a MambaMixer.
            kept: the states that stay, of N.
            mixing: (K, N) matrix M of the repair: the kept states' C rows become M C. None keeps them as they are.
        """
        if mixing is not None:
            _, c_rows = self.state_rows(mixer)
            with torch.no_grad():
                for tensor in (t for t in (mixer.x_proj.weight, mixer.x_proj.bias) if t is not None):
                    mixed = mixing.to(tensor.device, torch.float64) @ tensor[c_rows].double()
                    tensor[c_rows][list(kept)] = mixed.to(tensor.dtype)
        self.mask(mixer, STATE, kept)

    def with_size(self, config: Any, dimension: str, count: int) -> Any:
        """A configuration whose mixers have `count` states or channels, and all else the same.

        `expand` stays, which transformers wants whole and does not look at when `intermediate_size` is there.
        """
        other = copy.deepcopy(config)
        setattr(other, {STATE: self.state_field, CHANNEL: "intermediate_size"}[dimension], count)
        return other

    def after_narrow(self, mixer: nn.Module, dimension: str, sizes: Sizes, left: int) -> None:
        """Tell a narrow mixer how many channels or states it has."""
        setattr(mixer, {CHANNEL: "intermediate_size", STATE: "ssm_state_size"}[dimension], left)

    @staticmethod
    def state_rows(mixer: nn.Module) -> tuple[slice, slice]:
        """The B rows and the C rows of x_proj."""
        n, r = mixer.ssm_state_size, mixer.time_step_rank
        return slice(r, r + n), slice(r + n, r + 2 * n)
