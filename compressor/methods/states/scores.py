"""Scores: from a layer's A_log and streaming sums to the importance of its states. Pure functions, higher is dearer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ssmc.compressor.methods.states.contributions import Contributions
from ssmc.compressor.methods.states.elimination import eliminate, eliminate_from, eliminate_scaled
from ssmc.compressor.methods.states.readers import ReadoutGrams, stretches_apart
from ssmc.compressor.methods.states.statistics import (
    STRETCH,
    NormalMatrix,
    SquaredReadout,
    SquaredStates,
    States,
    Statistic,
    TimeWeighted,
    Vote,
    time_weights,
)
from ssmc.compressor.methods.weights.masks import NM, Target, nm_mask, pruned_count, unstructured_mask
from ssmc.compressor.methods.weights.second_moments import StateMoment
from ssmc.compressor.methods.weights.sparsegpt import sparsegpt_a_log
from ssmc.compressor.options.config import CompressConfig
from ssmc.compressor.options.patterns import COLUMN, Score


@dataclass(frozen=True)
class LayerStatistics:
    """The sums one layer's decision rests on; those that nobody asked for are None."""

    squares: SquaredStates | None = None
    readout: SquaredReadout | None = None
    weighted: TimeWeighted | None = None
    vote: Vote | None = None
    normal: NormalMatrix | None = None
    contributions: Contributions | None = None
    readouts: ReadoutGrams | None = None
    states: States | None = None

    def wanted(self) -> Sequence[Statistic]:
        """The sums to collect, possibly none."""
        return [statistic for statistic in vars(self).values() if statistic is not None]


@dataclass(frozen=True)
class Layer:
    """What a score may look at."""

    index: int
    A_log: torch.Tensor  # (D, N)
    statistics: LayerStatistics = field(default_factory=LayerStatistics)


def statistics_for(
    config: CompressConfig, A_log: torch.Tensor, keep: int, length: int, heads: int | None = None, samples: int = 0
) -> LayerStatistics:
    """Empty sums for what a run wants to know of a layer's states.

    Args:
        config: pattern, score, weighting, repair.
        A_log: (D, N) of the layer.
        keep: how many states will stay, for the pattern `column`.
        length: tokens of a calibration sample.
        heads: of a group of a Mamba-2, whose C rows cannot be mixed; None for a Mamba-1.
        samples: how many there are, for the statistics that keep some of the tokens.
    """
    column = COLUMN in config.parts
    score = config.judge_of(COLUMN) if column else config.judge
    exact = column and (config.repair or score is Score.exact)
    return LayerStatistics(
        squares=SquaredStates() if score is Score.sparsessm_l2 else None,
        readout=SquaredReadout() if score in (Score.energy, Score.ghost) else None,
        weighted=TimeWeighted(time_weights(config.weighting, length)) if score is Score.sparsessm else None,
        vote=_vote(config, A_log, keep, heads) if score is Score.sparsessm_vote else None,
        normal=NormalMatrix() if exact and heads is None else None,
        contributions=Contributions(heads) if exact and heads is not None else None,
        readouts=_readouts(A_log, length * samples, heads) if column and config.repair and heads is not None else None,
        states=States(StateMoment(A_log.shape[1], A_log.device)) if score is Score.sparsegpt else None,
    )


def _readouts(A_log: torch.Tensor, tokens: int, heads: int) -> ReadoutGrams:
    return ReadoutGrams(heads, stretches_apart(tokens, STRETCH, A_log.shape[1], heads))


def _vote(config: CompressConfig, A_log: torch.Tensor, keep: int, heads: int | None) -> Vote:
    nominate = _nominate(config, A_log.shape[1] - keep)
    if COLUMN in config.parts or heads is None:
        return Vote(A_log, nominate, COLUMN in config.parts)
    return Vote(A_log, lambda importance: nominate(_by_head(importance, heads)[..., None, :])[..., 0, :], False)


def _by_head(importance: torch.Tensor, heads: int) -> torch.Tensor:
    """(..., D, N) summed over the channels and states of each head, (..., H)."""
    return importance.unflatten(-2, (heads, -1)).sum((-2, -1))


def _nominate(config: CompressConfig, states: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """What one time step names: so many states, so many entries, or so many in every group of N:M. Real top-Ks."""
    if COLUMN in config.parts:
        return lambda importance: _lowest(importance, states)
    if config.nm:
        return lambda importance: ~nm_mask(importance, config.nm.n, config.nm.m)

    def entries(importance: torch.Tensor) -> torch.Tensor:  # (T, D, N)
        flat = importance.flatten(1)
        return _lowest(flat, pruned_count(flat.shape[1], config.sparsity)).view(importance.shape)

    return entries


def _lowest(importance: torch.Tensor, count: int) -> torch.Tensor:
    """True at the `count` lowest of each row."""
    named = torch.zeros(importance.shape, dtype=torch.bool, device=importance.device)
    return named.scatter_(1, importance.topk(count, dim=1, largest=False).indices, True)


def entry_importance(score: Score, layer: Layer, seed: int = 0) -> torch.Tensor:
    """Importance of every entry of A_log, (D, N), for the scores that judge entries.

    magnitude: |A_log|. sparsessm-l2: A_log^2 sum h_{t-1}^2 (SparseSSM, Theorem 1). sparsessm: the time-weighted form of
    its second version. sparsessm-vote: how seldom the steps named it. energy: sum of (C h)^2. ghost: sum of h^2 times
    sum of C^2 (GHOST).
    """
    A_log, sums = layer.A_log.double(), layer.statistics
    if score is Score.magnitude:
        return A_log.abs()
    if score is Score.random:
        return _random(A_log.shape, layer.index, seed)
    if score is Score.sparsessm_l2:
        return A_log.square() * sums.squares.value.t()
    if score is Score.sparsessm:
        return sums.weighted.value.t()
    if score is Score.sparsessm_vote:
        return -sums.vote.value.double()  # the most often named goes first
    if score is Score.energy:
        return sums.readout.products.t()
    if score is Score.ghost:
        return sums.readout.states.t() * sums.readout.readers
    raise ValueError(f"{score.value} does not judge single entries of A_log")


def state_importance(score: Score, layer: Layer, seed: int) -> torch.Tensor:
    """Importance of every state, (N,): the entries summed over channels, or the score's own rule for states."""
    if score is Score.random:
        return _random(layer.A_log.shape[1:], layer.index, seed)
    if score is Score.sparsessm_vote:
        return -layer.statistics.vote.value.double()  # the most often named goes first
    return entry_importance(score, layer).sum(0)


def _random(shape: Sequence[int], layer: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(layer_seed(seed, layer))
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def layer_seed(seed: int, layer: int) -> int:
    """A seed of its own for every layer."""
    return (seed * 1_000_003 + layer) % 2**63


def choose_states(score: Score, layer: Layer, keep: int, repair: bool, seed: int) -> list[int]:
    """The states that stay, ascending.

    Args:
        score: how to judge.
        layer: what to judge by.
        keep: how many stay.
        repair: whether the choice will be repaired; `exact` judges accordingly.
        seed: for `random`.
    """
    if score is Score.exact and layer.statistics.contributions:
        errors = layer.statistics.contributions.errors(repair)
        # scales of what stays stand in for the refit of C rows, which is no least-squares problem
        return eliminate_scaled(errors, keep) if repair else eliminate_from(errors, keep)
    if score is Score.exact:
        return eliminate(layer.statistics.normal.dense(), keep, repair)
    importance = state_importance(score, layer, seed).cpu()
    # stable, so that equal importances are decided by position and not by the sorting routine
    return sorted(importance.argsort(descending=True, stable=True)[:keep].tolist())


def prune_heads(score: Score, groups: Sequence[Layer], A_log: torch.Tensor, target: Target, seed: int) -> torch.Tensor:
    """A Mamba-2's A_log (H,) with entries set to 0, that is A = -1, one number for all channels and states of a head.

    A head is judged by the sum over them of what the score says of an entry.

    Args:
        score: how to judge; not sparsegpt, which has no other entry of a head to move.
        groups: what to judge the heads of each group by.
        A_log: (H,) of the layer.
        target: sparsity over all heads, or N:M along neighbouring ones.
        seed: for `random`.
    """
    heads = len(A_log) // len(groups)
    if score is Score.random:
        importance = _random(A_log.shape, groups[0].index, seed)
    elif score is Score.sparsessm_vote:
        importance = torch.cat([-group.statistics.vote.value.double() for group in groups])
    else:
        importance = torch.cat([_by_head(entry_importance(score, group), heads) for group in groups])
    return A_log * _mask(importance.to(A_log.device), target)


def prune_entries(score: Score, layer: Layer, target: Target, seed: int) -> torch.Tensor:
    """A_log (D, N) with entries set to 0, that is A = -1; SparseGPT also moves the entries that stay.

    Args:
        score: how to judge.
        layer: what to judge by.
        target: sparsity over all entries, or N:M along the states.
        seed: for `random`.
    """
    if score is Score.sparsegpt:
        return sparsegpt_a_log(layer.A_log, layer.statistics.states.moment.total, target).weight
    return layer.A_log * _mask(entry_importance(score, layer, seed).to(layer.A_log.device), target)


def _mask(importance: torch.Tensor, target: Target) -> torch.Tensor:
    return nm_mask(importance, target.n, target.m) if isinstance(target, NM) else unstructured_mask(importance, target)
