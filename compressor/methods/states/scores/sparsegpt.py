"""The baseline "SparseGPT on A_log": A_log treated as a linear map of the hidden state."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssmc.compressor.methods.registry import register_score
from ssmc.compressor.methods.states.score import ScoredGroup, StateScore
from ssmc.compressor.options.patterns import UNSTRUCTURED
from ssmc.compressor.options.sparsity import Sparsity

if TYPE_CHECKING:
    import torch

    from ssmc.compressor.methods.method import Plan


@register_score
class SparseGPTOnALog(StateScore):
    """Sets entries to 0 and moves those that stay, as SparseGPT does with a linear layer."""

    name = "sparsegpt"
    help = "treats A_log as SparseGPT treats a linear layer"
    needs = ("moment",)
    decides = (UNSTRUCTURED,)

    def refusal(self, plan: Plan) -> str | None:
        """A head of a Mamba-2 has one A_log, and nothing else to move."""
        if not plan.has_heads:
            return None
        return (
            "SparseGPT on A_log lets a channel's other states make up for one that goes; a head of "
            f"{plan.architecture.model_type} has one A_log, so nothing is left to do so. Use another score."
        )

    def pruned_entries(self, group: ScoredGroup, sparsity: Sparsity) -> torch.Tensor:
        """(D, N)."""
        from ssmc.compressor.methods.weights.sparsegpt import sparsegpt_a_log

        return sparsegpt_a_log(group.A_log, group.sums["moment"].moment.total, sparsity).weight
