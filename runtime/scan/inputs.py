"""What a selective scan reads, under one name, so that kernels, calibration and models speak of the same thing."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class ScanInputs:
    """Everything the recurrence of one Mamba-1 layer needs, for B sequences of L tokens.

    The recurrence (Mamba, section 3.2, with the zero-order hold of the official code)::

        h_t = exp(dt_t A) * h_{t-1} + dt_t u_t B_t        # (D, N)
        y_t = (h_t C_t + D u_t) * silu(z_t)               # (D,)

    Channels are the last, contiguous axis of `u`, `dt` and `z`: kernels vectorise over them.
    """

    u: torch.Tensor  # (B, L, D) after conv1d and silu
    dt: torch.Tensor  # (B, L, D) time step after softplus, positive
    A: torch.Tensor  # (D, N) float32, negative: -exp(A_log)
    B: torch.Tensor  # (B, L, N)
    C: torch.Tensor  # (B, L, N)
    D: torch.Tensor  # (D,) skip connection
    z: torch.Tensor | None = None  # (B, L, D) gate before silu; None: the output is not gated
    dt_bias: torch.Tensor | None = None  # (D,) if given, dt is before bias and softplus: kernels of a GPU fuse them

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

    @property
    def d_state(self) -> int:
        """Number of states N per channel."""
        return self.A.shape[1]

    def initial_state(self) -> torch.Tensor:
        """The zero state every sequence starts from, (B, D, N) float32."""
        return self.u.new_zeros(self.batch, self.d_inner, self.d_state, dtype=torch.float32)

    def with_time_steps(self) -> ScanInputs:
        """The same inputs with bias and softplus applied to dt, in float32, as the models do it."""
        if self.dt_bias is None:
            return self
        return replace(self, dt=F.softplus(self.dt.float() + self.dt_bias.float()), dt_bias=None)

    def sequences(self, rows: slice) -> ScanInputs:
        """The same inputs for some of the B sequences only (views, nothing is copied)."""
        z = None if self.z is None else self.z[rows]
        return replace(self, u=self.u[rows], dt=self.dt[rows], B=self.B[rows], C=self.C[rows], z=z)
