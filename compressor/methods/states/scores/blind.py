"""Scores that look at no text: `magnitude` and `random`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ssmc.compressor.methods.registry import register_score
from ssmc.compressor.methods.states.score import ScoredGroup, StateScore
from ssmc.compressor.options.patterns import COLUMN

if TYPE_CHECKING:
    import torch

    from ssmc.compressor.methods.method import Plan


@register_score
class Magnitude(StateScore):
    """|A_log|."""

    name = "magnitude"
    help = "goes by the size of A_log and looks at no text"
    needs_text = False

    def refusal(self, plan: Plan) -> str | None:
        """A head of a Mamba-2 has one A_log for all of its states."""
        if not plan.has_heads or COLUMN not in plan.config.parts:
            return None
        return (
            f"The score magnitude cannot tell the states of {plan.architecture.model_type} apart: a head has one A_log "
            "for all of them. Use another score."
        )

    def importance(self, group: ScoredGroup) -> torch.Tensor:
        """(D, N)."""
        return group.A_log.double().abs()


@register_score
class Random(StateScore):
    """A draw that follows the seed and differs between layers."""

    name = "random"
    help = "draws what is removed, to compare with"
    needs_text = False

    def importance(self, group: ScoredGroup) -> torch.Tensor:
        """(D, N)."""
        return self._draw(group.A_log.shape, group)

    def of_states(self, group: ScoredGroup) -> torch.Tensor:
        """(N,)."""
        return self._draw(group.A_log.shape[1:], group)

    def of_heads(self, groups: Sequence[ScoredGroup], heads: int) -> torch.Tensor:
        """(H,)."""
        return self._draw((heads * len(groups),), groups[0])

    @staticmethod
    def _draw(shape: Sequence[int], group: ScoredGroup) -> torch.Tensor:
        from ssmc.compressor.methods.states.ranking import random_importance

        return random_importance(shape, group.index, group.seed)
