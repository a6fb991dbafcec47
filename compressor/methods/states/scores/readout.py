"""Scores that weigh a state by what is read out of it: `energy` and `ghost`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssmc.compressor.methods.registry import register_score
from ssmc.compressor.methods.states.score import ScoredGroup, StateScore

if TYPE_CHECKING:
    import torch


@register_score
class Energy(StateScore):
    """sum over tokens of (C_t[n] h_t[d, n])^2."""

    name = "energy"
    help = "goes by the energy of what is read out of a state"
    needs = ("readout",)

    def importance(self, group: ScoredGroup) -> torch.Tensor:
        """(D, N)."""
        return group.sums["readout"].products.t()


@register_score
class Ghost(StateScore):
    """sum of h_t[d, n]^2 times sum of C_t[n]^2 (GHOST)."""

    name = "ghost"
    help = "goes by the energy of a state times that of C, which reads it (GHOST)"
    needs = ("readout",)

    def importance(self, group: ScoredGroup) -> torch.Tensor:
        """(D, N)."""
        return group.sums["readout"].states.t() * group.sums["readout"].readers
