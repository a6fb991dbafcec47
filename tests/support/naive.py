"""Slow, obvious versions of what ssmc computes, written from the formulas: the oracles of the tests."""

import math

import numpy as np
import torch

from ssmc.runtime.scan import ScanInputs


def random_inputs(batch=3, length=11, d_inner=7, d_state=5, seed=0, gated=True):
    """Inputs of a scan with no structure to hide behind; A is not the usual -1..-N."""
    g = torch.Generator().manual_seed(seed)
    return ScanInputs(
        u=torch.randn(batch, length, d_inner, generator=g),
        dt=0.05 + torch.rand(batch, length, d_inner, generator=g),
        A=-(0.1 + 2 * torch.rand(d_inner, d_state, generator=g)),
        B=torch.randn(batch, length, d_state, generator=g),
        C=torch.randn(batch, length, d_state, generator=g),
        D=torch.randn(d_inner, generator=g),
        z=torch.randn(batch, length, d_inner, generator=g) if gated else None,
    )


def hidden_states(inputs, state=None):
    """h before every token and after the last: (B, L + 1, D, N) float64, one scalar at a time."""
    u, dt, A, B = (x.double().numpy() for x in (inputs.u, inputs.dt, inputs.A, inputs.B))
    batch, length, d_inner = u.shape
    n = A.shape[1]
    h = np.zeros((batch, length + 1, d_inner, n))
    if state is not None:
        h[:, 0] = state.double().numpy()
    for b in range(batch):
        for t in range(length):
            for d in range(d_inner):
                for k in range(n):
                    decay = math.exp(dt[b, t, d] * A[d, k])
                    h[b, t + 1, d, k] = decay * h[b, t, d, k] + dt[b, t, d] * u[b, t, d] * B[b, t, k]
    return h


def silu(x):
    return x / (1 + np.exp(-x))


def scan_output(inputs, h, mixing=None, kept=None):
    """y (B, L, D): read-out of the kept states with C rows M C, without the D skip, times the gate."""
    C = inputs.C.double().numpy()
    kept = list(range(C.shape[2])) if kept is None else list(kept)
    readers = C[..., kept] if mixing is None else np.einsum("kn,btn->btk", mixing, C)
    y = np.einsum("btk,btdk->btd", readers, h[:, 1:][..., kept])
    return y if inputs.z is None else y * silu(inputs.z.double().numpy())
