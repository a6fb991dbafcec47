"""The scores of SparseSSM: Theorem 1 (`sparsessm-l2`), the vote of Algorithm 1, and the weighted form of version 2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ssmc.compressor.methods.registry import register_score
from ssmc.compressor.methods.states.score import ScoredGroup, StateScore

if TYPE_CHECKING:
    import torch


@register_score
class SparseSSMVote(StateScore):
    """How seldom the time steps named a candidate for removal (version 1, Algorithm 1)."""

    name = "sparsessm-vote"
    help = "removes what most time steps name as least important (SparseSSM, version 1)"
    needs = ("vote",)
    streams = False

    def importance(self, group: ScoredGroup) -> torch.Tensor:
        """(D, N)."""
        return -group.sums["vote"].value.double()

    def of_states(self, group: ScoredGroup) -> torch.Tensor:
        """(N,): the vote is on whole states."""
        return self.importance(group)

    def of_heads(self, groups: Sequence[ScoredGroup], heads: int) -> torch.Tensor:
        """(H,): the vote is on whole heads."""
        import torch

        return torch.cat([self.importance(group) for group in groups])


@register_score
class SparseSSM(StateScore):
    """sum_t w_t (sum_b dA_t)^2 (sum_b h_{t-1}^2): the time-weighted form of version 2."""

    name = "sparsessm"
    help = "goes by A's decay and the energy of the state, weighted over time (SparseSSM, version 2; `--weighting`)"
    needs = ("weighted",)
    streams = False

    def importance(self, group: ScoredGroup) -> torch.Tensor:
        """(D, N)."""
        return group.sums["weighted"].value.t()


@register_score
class SparseSSML2(StateScore):
    """A_log^2 sum h_{t-1}^2 (Theorem 1)."""

    name = "sparsessm-l2"
    help = "goes by A_log squared times the energy of the state (SparseSSM, Theorem 1)"
    needs = ("squares",)

    def importance(self, group: ScoredGroup) -> torch.Tensor:
        """(D, N)."""
        return group.A_log.double().square() * group.sums["squares"].value.t()
