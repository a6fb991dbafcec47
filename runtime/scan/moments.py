"""Sums over all hidden states of a scan, for whoever asks what the states do and not what they are.

The states of a layer are N times as much data as what the scan reads. The sums are not: `scan_moments` computes them
on a GPU while the states are in registers, and elsewhere from a stretch of states at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ssmc.runtime.later import F, torch
from ssmc.runtime.scan import reference
from ssmc.runtime.scan.inputs import ScanInputs

STRETCH = 64
"""Tokens whose states exist at once, where they exist."""


@dataclass(frozen=True)
class Moments:
    """Sums over all sequences and tokens of one scan; float64 but for the state."""

    state: torch.Tensor  # (B, D, N) float32 after the last token
    before: torch.Tensor  # (N, D): sum of h_{t-1}^2
    after: torch.Tensor  # (N, D): sum of h_t^2
    readouts: torch.Tensor  # (N, D): sum of (C_t h_t)^2
    readers: torch.Tensor  # (N,): sum of C_t^2
    quartic: torch.Tensor  # (N N, N N): see `quartic_moment`


@dataclass(frozen=True)
class SsdMoments:
    """Sums over all sequences and tokens of one scan of a Mamba-2, over a group's H heads of P channels, D in all.

    x_t[d, n] = gain_t[d] C_t[n] h_t[d, n] is what a state contributes to a channel on its way to out_proj. float64 but
    for the state.
    """

    state: torch.Tensor  # (B, H, P, N) float32 after the last token
    before: torch.Tensor  # (N, D): sum of h_{t-1}^2
    after: torch.Tensor  # (N, D): sum of h_t^2
    readouts: torch.Tensor  # (N, D): sum of (C_t h_t)^2
    readers: torch.Tensor  # (N,): sum of C_t^2
    gram: torch.Tensor  # (N, N): sum of x_t[d, n] x_t[d, m] over channels, too
    cross: torch.Tensor  # (H, N): sum of x_t[d, n] gain_t[d] u_t[d] over the channels of a head
    skip: torch.Tensor  # (H,): sum of (gain_t[d] u_t[d])^2 over the channels of a head


def moments_of_states(
    inputs: ScanInputs,
    state: torch.Tensor | None = None,
    scan_states: Callable[[ScanInputs, torch.Tensor | None], torch.Tensor] = reference.scan_states,
) -> Moments:
    """The sums from the states themselves, in plain torch on any device.

    Args:
        inputs: what the scan reads.
        state: (B, D, N) before the first token; None starts from zero.
        scan_states: what computes the states.
    """
    inputs = inputs.with_time_steps()
    total: Moments | None = None
    for part in stretches(inputs, STRETCH):
        states = scan_states(part, state)  # (B, T + 1, N, D)
        state = states[:, -1].transpose(1, 2)
        C = part.C.float()
        sums = Moments(
            state.contiguous(),
            sum_of_squares(states[:, :-1]).double(),
            sum_of_squares(states[:, 1:]).double(),
            sum_of_squares(states[:, 1:], C).double(),
            C.square().sum((0, 1)).double(),
            quartic_moment(states[:, 1:], part),
        )
        total = sums if total is None else added(total, sums)
    if total is None:
        raise ValueError("there are no sums over no tokens")
    return total


def stretches(inputs: ScanInputs, tokens: int) -> Iterator[ScanInputs]:
    """The same inputs, `tokens` tokens at a time (views)."""
    for start in range(0, inputs.length, tokens):
        sequences = {name: getattr(inputs, name) for name in ("u", "dt", "B", "C", "z")}
        cut = {name: t if t is None else t[:, start : start + tokens] for name, t in sequences.items()}
        yield replace(inputs, **cut)


def added(first: Moments, second: Moments) -> Moments:
    """The sums over both, with the state of the second."""
    sums = {name: getattr(first, name) + getattr(second, name) for name in vars(first) if name != "state"}
    return Moments(state=second.state, **sums)


def sum_of_squares(states: torch.Tensor, readers: torch.Tensor | None = None) -> torch.Tensor:
    """sum over samples and time of states^2, (N, D), each weighted by readers^2 (B, T, N) if given.

    Args:
        states: (B, T, N, D).
        readers: (B, T, N) or None.
    """
    if readers is not None:
        states = states * readers[..., None]
    return states.square().sum((0, 1))


def quartic_moment(states: torch.Tensor, inputs: ScanInputs, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Q[k, m, n, p] = sum_t w_t (sum_d g_{t,d}^2 h_t[d, k] h_t[d, m]) C_t[n] C_t[p], with g = silu(z) the gate, or 1.

    A sum over tokens of outer products of two small (N, N) matrices, so one matrix product.

    Args:
        states: (B, T, N, D) h_t.
        inputs: the scan's inputs for these tokens.
        weights: (B, T) w_t; None: 1.

    Returns:
        (N N, N N) float64, row index k N + m, column index n N + p.
    """
    gated = states
    if inputs.z is not None:
        gated = gated * F.silu(inputs.z.float())[:, :, None, :]  # (B, T, N, D)
    gated = gated.flatten(0, 1)
    grams = torch.bmm(gated, gated.transpose(1, 2))  # (B T, N, N): sum over channels, a token at a time
    C = inputs.C if weights is None else inputs.C.float() * weights.sqrt()[..., None]
    return quartic_of_grams(grams, C)


def quartic_of_grams(grams: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
    """`quartic_moment` from each token's (N, N) sum over channels.

    Args:
        grams: (B T, N, N).
        C: (B, T, N).
    """
    C = C.float().flatten(0, 1)  # (B T, N)
    readers = C[:, :, None] * C[:, None, :]  # (B T, N, N)
    return grams.flatten(1).t().double() @ readers.flatten(1).double()
