"""Mamba-2's scan in chunks of matrix products, in plain torch: on any device, with gradients.

Within a chunk the recurrence is written out as a lower triangular matrix over token pairs, C_t B_s' exp(sum of dt A
from s + 1 to t); between chunks only the state travels (Mamba-2, section 6: state space duality). The heads of a group
share B and C, so C B' is computed once a group, and the products with the state are one matrix product for all of its
heads.
"""

from __future__ import annotations

import math

from ssmc.runtime.later import torch
from ssmc.runtime.scan.inputs import SsdInputs

CHUNK = 64  # tokens: the (T, T) matrices of all heads stay in a core's cache


def ssd_scan(inputs: SsdInputs, state: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the recurrence and read it out.

    Args:
        inputs: what the scan reads; float16 and bfloat16 are computed in float32.
        state: (B, H, P, N) state before the first token; None starts from zero. It is not modified.

    Returns:
        Output (B, L, D) in the dtype of `inputs.u`, not gated, and the final state (B, H, P, N) in float32.
    """
    h = inputs.initial_state() if state is None else state.float()
    rows = []
    with torch.autocast(inputs.u.device.type, enabled=False):
        for start in range(0, inputs.length, CHUNK):
            y, h = _chunk(inputs, slice(start, start + CHUNK), h)
            rows.append(y)
    y = torch.cat(rows, dim=1) if rows else inputs.u.float()
    return y.to(inputs.u.dtype), h if state is None or rows else h.clone()


def _chunk(inputs: SsdInputs, tokens: slice, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, T, D) of one chunk of T tokens, and the state after it."""
    groups, head_dim = inputs.groups, inputs.head_dim
    per_group = inputs.heads // groups
    dt = inputs.dt[:, tokens].float()  # (B, T, H)
    u = inputs.u[:, tokens].float().unflatten(2, (inputs.heads, head_dim))  # (B, T, H, P)
    B, C = (x[:, tokens].float().transpose(1, 2) for x in (inputs.B, inputs.C))  # (B, G, T, N)
    drive = dt[..., None] * u  # (B, T, H, P)
    decay, since_start, to_end = _decays(dt * inputs.A.float())
    pairs = (C @ B.transpose(2, 3))[:, :, None] * decay.unflatten(1, (groups, per_group))  # (B, G, H/G, T, T)
    y = (pairs.flatten(1, 2) @ drive.transpose(1, 2)).transpose(1, 2)  # (B, T, H, P)
    by_group = h.reshape(h.shape[0], groups, per_group * head_dim, -1)  # (B, G, H/G P, N)
    carried = (C @ by_group.transpose(2, 3)).unflatten(3, (per_group, head_dim))  # (B, G, T, H/G, P)
    y = y + carried.transpose(1, 2).flatten(2, 3) * since_start[..., None]
    left = (drive * to_end[..., None]).unflatten(2, (groups, per_group)).flatten(3).transpose(1, 2)  # (B, G, T, H/G P)
    h = h * since_start[:, -1, :, None, None] + (left.transpose(2, 3) @ B).view(h.shape)
    return (y + inputs.D.float()[:, None] * u).flatten(2), h


def _decays(exponents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What remains after a stretch of tokens, from dt A (B, T, H), negative.

    Returns:
        Of token s at token t, (B, H, T, T), 0 where s > t; of the state before the chunk at token t, and of token s at
        the end of the chunk, both (B, T, H). The sums are taken in float64, because the difference of two long sums is
        what counts.
    """
    sums = exponents.double().cumsum(1)  # (B, T, H)
    over_time = sums.transpose(1, 2)
    between = (over_time[..., :, None] - over_time[..., None, :]).float()  # (B, H, t, s)
    later = torch.ones(between.shape[-2:], dtype=torch.bool, device=between.device).triu(1)
    since_start, to_end = sums.float().exp(), (sums[:, -1:] - sums).float().exp()
    return between.masked_fill(later, -math.inf).exp(), since_start, to_end
