"""What a selective scan reads, under one name, so that kernels, calibration and models speak of the same thing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from ssmc.runtime.later import F, torch
from ssmc.runtime.scan.accelerators import needs_gradients

_Inputs = TypeVar("_Inputs", bound="_Sequences")


@dataclass(frozen=True)
class _Sequences:
    """What the scans of both generations of Mamba read, for B sequences of L tokens."""

    u: torch.Tensor  # (B, L, D) after conv1d and silu
    dt: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor
    z: torch.Tensor | None = None

    A_log: torch.Tensor | None = field(default=None, kw_only=True)

    def with_rates(self: _Inputs) -> _Inputs:
        """The same inputs with A where there was A_log."""
        return self if self.A_log is None else replace(self, A=decay_rates(self.A_log), A_log=None)

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self.u.shape[0]

    @property
    def length(self) -> int:
        """Tokens per sequence."""
        return self.u.shape[1]

    @property
    def d_inner(self) -> int:
        """Number of channels D."""
        return self.u.shape[2]

    def sequences(self: _Inputs, rows: slice) -> _Inputs:
        """The same inputs for some of the B sequences only (views, nothing is copied)."""
        z = None if self.z is None else self.z[rows]
        return replace(self, u=self.u[rows], dt=self.dt[rows], B=self.B[rows], C=self.C[rows], z=z)


@dataclass(frozen=True)
class ScanInputs(_Sequences):
    """Everything the recurrence of one Mamba-1 layer needs.

    The recurrence (Mamba, section 3.2, with the zero-order hold of the official code)::

        h_t = exp(dt_t A) * h_{t-1} + dt_t u_t B_t        # (D, N)
        y_t = (h_t C_t + D u_t) * silu(z_t)               # (D,)

    Channels are the last, contiguous axis of `u`, `dt` and `z`: kernels vectorise over them.

    Attributes:
        u: (B, L, D) after conv1d and silu.
        dt: (B, L, D) time step after softplus, positive.
        A: (D, N) float32, negative: -exp(A_log).
        B: (B, L, N).
        C: (B, L, N).
        D: (D,) skip connection.
        z: (B, L, D) gate before silu; None: the output is not gated.
        dt_bias: (D,); if given, dt is before bias and softplus, which kernels for a GPU fuse.
        A_log: (D, N) of any dtype; if given, A is only of that shape, and a GPU's kernel of one token computes it.
    """

    dt_bias: torch.Tensor | None = None

    def with_time_steps(self) -> ScanInputs:
        """The same inputs with bias and softplus applied to dt, in float32, as the models do it, and A."""
        if self.A_log is not None:
            return self.with_rates().with_time_steps()
        if self.dt_bias is None:
            return self
        return replace(self, dt=F.softplus(self.dt.float() + self.dt_bias.float()), dt_bias=None)

    def some_states(self, kept: Sequence[int]) -> ScanInputs:
        """The same inputs with some of the N states only; nothing else changes if the others are silent."""
        index = torch.as_tensor(list(kept), device=self.A.device)
        return replace(self, A=self.A[:, index], B=self.B[..., index], C=self.C[..., index])

    @property
    def d_state(self) -> int:
        """Number of states N per channel."""
        return self.A.shape[1]

    def initial_state(self) -> torch.Tensor:
        """The zero state every sequence starts from, (B, D, N) float32."""
        return self.u.new_zeros(self.batch, self.d_inner, self.d_state, dtype=torch.float32)


@dataclass(frozen=True)
class SsdInputs(_Sequences):
    """Everything the recurrence of one Mamba-2 layer needs.

    The D = H P channels are H heads of P channels; the heads come in G groups of H / G neighbours, and a group shares B
    and C. One decay rate and one time step serve a whole head (Mamba-2, section 7.1)::

        h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t'        # (P, N) of each head
        y_t = h_t C_t + D u_t                            # (P,)

    Attributes:
        u: (B, L, D) after conv1d and silu.
        dt: (B, L, H) time step after softplus, positive.
        A: (H,) float32, negative: -exp(A_log).
        B: (B, L, G, N).
        C: (B, L, G, N).
        D: (H,) skip connection.
        z: (B, L, D) gate before silu. The scan does not apply it: it acts inside the gated norm that follows.
        dt_bias: (H,); if given, dt is before bias, softplus and limits, which kernels for a GPU fuse.
        dt_limit: between which numbers time steps are clamped, if `dt_bias` is given.
        A_log: (H,), see `ScanInputs`.
    """

    dt_bias: torch.Tensor | None = None
    dt_limit: tuple[float, float] = (0.0, math.inf)

    def with_time_steps(self) -> SsdInputs:
        """The same inputs with bias, softplus and limits applied to dt, in float32, as the models do it, and A."""
        if self.A_log is not None:
            return self.with_rates().with_time_steps()
        if self.dt_bias is None:
            return self
        dt = F.softplus(self.dt.float() + self.dt_bias.float())
        return replace(self, dt=dt.clamp(*self.dt_limit) if self.is_limited else dt, dt_bias=None)

    @property
    def is_limited(self) -> bool:
        """Whether `dt_limit` is for this dt, and a limit at all."""
        return self.dt_bias is not None and tuple(self.dt_limit) != (0.0, math.inf)

    @property
    def heads(self) -> int:
        """Number of heads H."""
        return self.dt.shape[2]

    @property
    def head_dim(self) -> int:
        """Channels P of a head."""
        return self.d_inner // self.heads

    @property
    def groups(self) -> int:
        """Number of groups G."""
        return self.B.shape[2]

    @property
    def d_state(self) -> int:
        """Number of states N per channel."""
        return self.B.shape[3]

    def initial_state(self) -> torch.Tensor:
        """The zero state every sequence starts from, (B, H, P, N) float32."""
        return self.u.new_zeros(self.batch, self.heads, self.head_dim, self.d_state, dtype=torch.float32)


def decay_rates(a_log: torch.Tensor, fused: bool = False) -> torch.Tensor:
    """A = -exp(A_log) in float32, of any shape; in one kernel of a GPU's if `fused`."""
    if fused and not needs_gradients([a_log]):
        from ssmc.runtime.scan.gpu import step  # imports triton, which a scan on a GPU has

        return step.decay_rates(a_log)
    return -torch.exp(a_log.float())
