"""The built-in scores of weights, registered when this is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssmc.compressor.methods.registry import register_score
from ssmc.compressor.methods.weights.score import Moment, WeightScore
from ssmc.compressor.options.sparsity import Sparsity

if TYPE_CHECKING:
    import torch


@register_score
class SparseGPT(WeightScore):
    """SparseGPT; for conv1d, whose channels have a problem of their own each, the exact best taps."""

    name = "sparsegpt"
    help = "prunes one weight after the other and lets those that stay make up for it"

    def prune(
        self, weight: torch.Tensor, moment: Moment | None, sparsity: Sparsity
    ) -> tuple[torch.Tensor, float | None]:
        """The weights that stay are changed."""
        from ssmc.compressor.methods.weights.depthwise import prune_depthwise
        from ssmc.compressor.methods.weights.sparsegpt import sparsegpt

        if moment is None:  # nothing was read: there is nothing to make up for
            return MagnitudeOfWeights().prune(weight, None, sparsity)
        solver = prune_depthwise if moment.total.dim() == 3 else sparsegpt
        result = solver(weight, moment.total, sparsity)
        return result.weight.to(weight.dtype), result.error


@register_score
class Wanda(WeightScore):
    """Wanda: |W_ij| times the norm of what input j reads."""

    name = "wanda"
    help = "goes by the size of a weight times that of what it reads"

    def prune(
        self, weight: torch.Tensor, moment: Moment | None, sparsity: Sparsity
    ) -> tuple[torch.Tensor, float | None]:
        """The weights that stay are unchanged."""
        from ssmc.compressor.methods.weights.wanda import wanda

        if moment is None:
            return MagnitudeOfWeights().prune(weight, None, sparsity)
        return weight * wanda(weight, moment.total.diagonal(dim1=-2, dim2=-1), sparsity), None


@register_score
class MagnitudeOfWeights(WeightScore):
    """|W_ij|."""

    name = "magnitude"
    help = "goes by the size of a weight and looks at no text"
    needs_text = False

    def prune(
        self, weight: torch.Tensor, moment: Moment | None, sparsity: Sparsity
    ) -> tuple[torch.Tensor, float | None]:
        """The weights that stay are unchanged."""
        from ssmc.compressor.methods.weights.wanda import magnitude

        return weight * magnitude(weight, sparsity), None
