"""States of a Mamba-1 whose B and C pass a norm over the states (Falcon-Mamba, Jamba): what folds, and what does not.

With b_t the B rows of x_proj applied to u_t, the scan reads B_t = w b_t / rms(b_t), and C likewise. Removing states
changes the root mean square, by a factor of its own for every token; B and C of the states that stay are off by it.
Its constant part folds: the read-out takes a number behind the norms. What varies from token to token is made small
by scaling the rows that stay against each other: scaling b[n] by s and undoing it behind the norm (by its weights, or
by 1/s in c[n], as only the product of B and C counts) changes nothing but the root mean square. So s is fitted to let
the sum of squares that is left follow the one of all states. The rest is measured.

Several processes each run the layer on their own samples; the squares, few numbers a token, are brought together.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import nn

from ssmc.compressor.calibration.placement import device_of, samples
from ssmc.compressor.methods.descent import Pace, descend
from ssmc.runtime.collectives import gathered, share_of, summed
from ssmc.runtime.models.architectures.interface import NormedReaders
from ssmc.runtime.models.families import Architecture

TOKENS = 4096  # what is fitted and measured looks at no more, or at one sample
STEPS = 150
RATE = 0.05  # of the logarithm of a scale, a step of Adam


@dataclass(frozen=True)
class NormFit:
    """What removing states costs with the norms as they are then, measured on the layer itself."""

    error: float  # squared error of the gated read-out relative to its energy
    error_unrepaired: float  # with the rows that stay as they were
    spread: float  # standard deviation over tokens of the logarithm of the norms' factor: 0.03 is about 3 %


@dataclass(frozen=True)
class _Seen:
    """What a layer computes for some tokens."""

    y: torch.Tensor  # (T, D): the gated read-out, without the skip, of the tokens of this process
    b: torch.Tensor  # (T, N): squares of what the norm of B reads, of the tokens of all
    c: torch.Tensor  # (T, N)


@dataclass(frozen=True)
class _Candidate:
    """The mixer with its states removed in one way."""

    error: float
    spread: float
    mixer: nn.Module


def remove_states(
    architecture: Architecture,
    block: nn.Module,
    hidden: torch.Tensor,
    kept: Sequence[int],
    mixing: torch.Tensor | None,
    repair: bool,
) -> NormFit:
    """Silence all states but `kept`, in place, in the way that loses least; without repair the rows stay as they are.

    Args:
        architecture: adapter of a family whose B and C pass norms.
        block: the layer, with all its states.
        hidden: (nsamples, L, d_model) what it reads.
        kept: the states that stay.
        mixing: (K, N) of the C rows that stay, which knows nothing of the norms' change; None: not mixed.
        repair: whether rows may be scaled, and mixed.
    """
    layer = _Layer(architecture, block, hidden[: share_of(max(1, TOKENS // hidden.shape[1]))], kept)
    plain = layer.candidate(None, scale=False)
    found = [plain]
    if repair:
        mixings = [None] if mixing is None else [None, mixing]
        found += [layer.candidate(m, scale=True) for m in mixings]
    best = min(found, key=lambda candidate: candidate.error)
    mixer = architecture.mixer(block)
    assert mixer is not None  # it lost states
    mixer.load_state_dict(best.mixer.state_dict())
    return NormFit(best.error, plain.error, best.spread)


class _Layer:
    """A layer that loses states, and what it computed before."""

    def __init__(self, architecture: Architecture, block: nn.Module, hidden: torch.Tensor, kept: Sequence[int]):
        self._architecture, self._block, self._hidden = architecture, block, hidden
        mixer = architecture.mixer(block)
        assert mixer is not None  # it loses states
        self._kept, self._mixer, self._norms = kept, mixer, cast(NormedReaders, architecture)
        self._dense = self._see(mixer)

    def candidate(self, mixing: torch.Tensor | None, scale: bool) -> _Candidate:
        """A copy of the mixer with states removed, its rows and read-out scaled to come closest to the dense one."""
        architecture, kept, dense = self._architecture, self._kept, self._dense
        mixer = copy.deepcopy(self._mixer)  # not the block: it may hold experts
        factor, ones = 1.0, torch.ones(len(kept), device=mixer.D.device)
        architecture.mask_states(mixer, kept, mixing)
        if scale:
            seen, index = self._see(mixer), list(kept)
            tied = not self._norms.has_norm_weights
            b, c = fit_scales(seen.b[:, index], seen.c[:, index], dense.b, dense.c, tied)
            self._norms.scale_readers(mixer, kept, b, c, 1.0)
        seen = self._see(mixer)
        cross, square, energy = (
            summed(float((p * q).sum())) for p, q in ((seen.y, dense.y), (seen.y, seen.y), (dense.y, dense.y))
        )
        if scale and cross > 0:
            factor = cross / square  # least squares
            self._norms.scale_readers(mixer, kept, ones, ones, factor)
        error = max(0.0, energy - 2 * factor * cross + factor**2 * square) / energy if energy > 0 else 0.0
        changes = _log_ratio(seen.b, dense.b) + _log_ratio(seen.c, dense.c)
        return _Candidate(error, float(changes.std(correction=0)) / 2, mixer)  # of squares

    def _see(self, mixer: nn.Module) -> _Seen:
        """Run a mixer in the place of the block's own over the samples."""
        architecture, block = self._architecture, self._block
        nothing, width = mixer.D.new_zeros(1, 0, len(mixer.D)), architecture.rates(mixer)[0].shape[1]
        parts = [(nothing, nothing[..., :width], nothing[..., :width])]
        for _, sample in samples(self._hidden, device_of(block)):
            inputs = architecture.scan_inputs(mixer, *architecture.expand(mixer, architecture.normed(block, sample)))
            y, _ = architecture.scan(mixer, replace(inputs, D=torch.zeros_like(inputs.D)))
            parts.append((y, *self._norms.before_norm(mixer, inputs.u)))
        y, b, c = (torch.cat(part, dim=1)[0].double() for part in zip(*parts, strict=True))
        return _Seen(y, torch.cat(gathered(b.square())), torch.cat(gathered(c.square())))


def fit_scales(
    b: torch.Tensor, c: torch.Tensor, dense_b: torch.Tensor, dense_c: torch.Tensor, tied: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of rows of B and C by which the sums of squares that are left follow those of all rows.

    Minimised is the variance over tokens of the logarithm of their ratio, for B and for C.

    Args:
        b: (T, K) squares of what the rows that stay put out, for every token.
        c: (T, K).
        dense_b: (T, N) squares of what all rows of the dense layer put out.
        dense_c: (T, N).
        tied: whether the factors of C must be the inverse of those of B.

    Returns:
        (K,) of B and (K,) of C, of geometric mean 1.
    """
    logs = [torch.zeros(b.shape[1], dtype=b.dtype, device=b.device, requires_grad=True) for _ in range(2 - tied)]

    def gradients() -> Sequence[torch.Tensor]:
        with torch.enable_grad():
            of_c = -logs[0] if tied else logs[1]
            loss = sum(
                _log_ratio(part * (2 * log).exp(), dense).var(correction=0)
                for part, log, dense in ((b, logs[0], dense_b), (c, of_c, dense_c))
            )
            return torch.autograd.grad(loss, logs)

    descend(logs, gradients, None, Pace(STEPS, [RATE] * len(logs), constant=True))
    of_b = logs[0].detach() - logs[0].detach().mean()
    of_c = -of_b if tied else logs[1].detach() - logs[1].detach().mean()
    return of_b.exp(), of_c.exp()


def _log_ratio(some: torch.Tensor, all_of_them: torch.Tensor) -> torch.Tensor:
    """Logarithm of the ratio of two sums of squares, (T,)."""
    least = torch.finfo(torch.float32).tiny
    return (some.sum(1) + least).log() - (all_of_them.sum(1) + least).log()
