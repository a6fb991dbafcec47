"""Scores: from a layer's A_log and streaming sums to the importance of its states. Pure functions, higher is dearer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .config import Score
from .repair import eliminate
from .statistics import NormalMatrix, SquaredReadout, SquaredStates, Statistic, TimeWeighted, Vote


@dataclass(frozen=True)
class LayerStatistics:
    """The sums one layer's decision rests on; those that nobody asked for are None."""

    squares: SquaredStates | None = None
    readout: SquaredReadout | None = None
    weighted: TimeWeighted | None = None
    vote: Vote | None = None
    normal: NormalMatrix | None = None

    def wanted(self) -> Sequence[Statistic]:
        """The sums to collect, possibly none."""
        return [s for s in (self.squares, self.readout, self.weighted, self.vote, self.normal) if s is not None]


@dataclass(frozen=True)
class Layer:
    """What a score may look at."""

    index: int
    A_log: torch.Tensor  # (D, N)
    statistics: LayerStatistics = field(default_factory=LayerStatistics)


def statistics_for(score: Score, A_log: torch.Tensor, keep: int, repair: bool) -> LayerStatistics:
    """Empty sums for a score, with or without repair.

    Args:
        score: the score that will read them.
        A_log: (D, N) of the layer.
        keep: how many states will stay.
        repair: whether the layer will be repaired.
    """
    n = A_log.shape[1]
    return LayerStatistics(
        squares=SquaredStates() if score is Score.sparsessm_l2 else None,
        readout=SquaredReadout() if score in (Score.energy, Score.ghost) else None,
        weighted=TimeWeighted() if score is Score.sparsessm else None,
        vote=Vote(A_log, n - keep) if score is Score.sparsessm_vote else None,
        normal=NormalMatrix() if repair or score is Score.exact else None,
    )


def entry_importance(score: Score, layer: Layer) -> torch.Tensor:
    """Importance of every entry of A_log, (D, N), for the scores that judge entries.

    magnitude: |A_log|. sparsessm-l2: A_log^2 sum h_{t-1}^2 (SparseSSM, Theorem 1). sparsessm: the time-weighted form of
    its second version. energy: sum of (C h)^2. ghost: sum of h^2 times sum of C^2 (GHOST).
    """
    A_log, sums = layer.A_log.double(), layer.statistics
    if score is Score.magnitude:
        return A_log.abs()
    if score is Score.sparsessm_l2:
        return A_log.square() * sums.squares.value.t()
    if score is Score.sparsessm:
        return sums.weighted.value.t()
    if score is Score.energy:
        return sums.readout.products.t()
    if score is Score.ghost:
        return sums.readout.states.t() * sums.readout.readers
    raise ValueError(f"{score.value} does not judge single entries of A_log")


def state_importance(score: Score, layer: Layer, seed: int) -> torch.Tensor:
    """Importance of every state, (N,): the entries summed over channels, or the score's own rule for states."""
    if score is Score.random:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + layer.index) % 2**63)
        return torch.rand(layer.A_log.shape[1], generator=generator, dtype=torch.float64)
    if score is Score.sparsessm_vote:
        return -layer.statistics.vote.value.double()  # the most often named goes first
    return entry_importance(score, layer).sum(0)


def choose_states(score: Score, layer: Layer, keep: int, repair: bool, seed: int) -> list[int]:
    """The states that stay, ascending.

    Args:
        score: how to judge.
        layer: what to judge by.
        keep: how many stay.
        repair: whether the choice will be repaired; `exact` judges accordingly.
        seed: for `random`.
    """
    if score is Score.exact:
        return eliminate(layer.statistics.normal.dense(), keep, repair)
    importance = state_importance(score, layer, seed).cpu()
    # stable, so that equal importances are decided by position and not by the sorting routine
    return sorted(importance.argsort(descending=True, stable=True)[:keep].tolist())
