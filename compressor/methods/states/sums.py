"""The sums over hidden states that scores and the repair of states can ask for, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ssmc.compressor.methods.states.c_rows import ReadoutGrams, what_fits
from ssmc.compressor.methods.states.contributions import Contributions
from ssmc.compressor.methods.states.ranking import by_head, lowest
from ssmc.compressor.methods.states.statistics import (
    NormalMatrix,
    SquaredReadout,
    SquaredStates,
    States,
    Statistic,
    TimeWeighted,
    Vote,
    time_weights,
)
from ssmc.compressor.methods.weights.masks import nm_mask, pruned_count
from ssmc.compressor.methods.weights.second_moments import StateMoment
from ssmc.compressor.options.config import CompressConfig
from ssmc.compressor.options.patterns import COLUMN
from ssmc.runtime.scan.moments import STRETCH


@dataclass(frozen=True)
class Request:
    """What sums of one layer, or of one group of heads of it, may depend on.

    Attributes:
        config: of the run.
        A_log: (D, N).
        keep: how many states will stay, for the pattern `column`.
        length: tokens of a calibration sample; 0 where samples come in pieces of any length.
        samples: how many there are, those of other processes among them.
        heads: of a group of a Mamba-2, whose C rows cannot be mixed; None for a Mamba-1.
    """

    config: CompressConfig
    A_log: torch.Tensor
    keep: int
    length: int = 0
    samples: int = 0
    heads: int | None = None


def _vote(request: Request) -> Vote:
    nominate = _nominate(request.config, request.A_log.shape[1] - request.keep)
    whole_states, heads = COLUMN in request.config.parts, request.heads
    if whole_states or heads is None:
        return Vote(request.A_log, nominate, whole_states)
    return Vote(request.A_log, lambda importance: nominate(by_head(importance, heads)[..., None, :])[..., 0, :], False)


def _nominate(config: CompressConfig, states: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """What one time step names: so many states, so many entries, or so many in every group of N:M. Real top-Ks."""
    if COLUMN in config.parts:
        return lambda importance: lowest(importance, states)
    if nm := config.nm:
        return lambda importance: ~nm_mask(importance, nm.n, nm.m)

    def entries(importance: torch.Tensor) -> torch.Tensor:  # (T, D, N)
        flat = importance.flatten(1)
        return lowest(flat, pruned_count(flat.shape[1], config.sparsity_of(config.pattern))).view(importance.shape)

    return entries


def _readout_grams(request: Request) -> ReadoutGrams:
    heads = _heads(request)
    return ReadoutGrams(heads, what_fits(request.length, request.samples, STRETCH, request.A_log.shape[1] + heads))


def _heads(request: Request) -> int:
    if request.heads is None:
        raise ValueError("these sums are of models with heads")
    return request.heads


STATISTICS: dict[str, Callable[[Request], Statistic]] = {
    "squares": lambda request: SquaredStates(),
    "readout": lambda request: SquaredReadout(),
    "weighted": lambda request: TimeWeighted(time_weights(request.config.weighting, request.length)),
    "vote": _vote,
    "moment": lambda request: States(StateMoment(request.A_log.shape[1], request.A_log.device)),
    "normal": lambda request: NormalMatrix(),
    "contributions": lambda request: Contributions(_heads(request)),
    "readout-grams": _readout_grams,
}
"""Name -> empty sums. `squares`: of h_{t-1}; `readout`: squares of h, of C and of C h; `weighted`: SparseSSM v2;
`vote`: SparseSSM v1; `moment`: h h'; `normal`: the repair of a Mamba-1; `contributions` and `readout-grams`: of models
with heads."""
