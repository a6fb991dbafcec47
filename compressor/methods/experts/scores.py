"""The built-in scores of experts, registered when this is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssmc.compressor.methods.experts.score import ExpertScore, ScoredExperts
from ssmc.compressor.methods.registry import register_score

if TYPE_CHECKING:
    import torch


@register_score
class ExactExperts(ExpertScore):
    """The error of what the layer adds, with tokens sent anew and the maps beside the experts refitted."""

    name = "exact"
    help = (
        "removes the experts whose loss changes least of what the layer adds, once the router has sent their tokens to "
        "others and the maps beside the experts are refitted"
    )

    def choose(self, layer: ScoredExperts, keep: int, groups: int = 1) -> list[int]:
        """By backward elimination."""
        from ssmc.compressor.methods.experts.elimination import eliminate_experts

        return eliminate_experts(layer, keep, groups)


@register_score
class Reap(ExpertScore):
    """REAP (arXiv 2510.13999): the mean of g |f(x)| over the tokens of an expert, g what the router weighs it by."""

    name = "reap"
    help = "removes what adds least to a token that is sent there: the router's weight times the norm, on average"

    def importance(self, layer: ScoredExperts) -> torch.Tensor:
        """(E,); an expert that no token is sent to has none."""
        from ssmc.compressor.methods.experts.routing import added

        norms, sent = added(layer, power=1)
        return norms / sent.clamp(min=1)


@register_score
class ExpertActivation(ExpertScore):
    """sum over its tokens of |g f(x)|^2."""

    name = "activation"
    help = "removes what adds least to all tokens together"

    def importance(self, layer: ScoredExperts) -> torch.Tensor:
        """(E,)."""
        from ssmc.compressor.methods.experts.routing import added

        return added(layer, power=2)[0]


@register_score
class ExpertMagnitude(ExpertScore):
    """|W|^2 of the last map."""

    name = "magnitude"
    help = "goes by the size of the experts' last map and looks at no text"
    needs_text = False

    def importance(self, layer: ScoredExperts) -> torch.Tensor:
        """(E,)."""
        weights: torch.Tensor = layer.module.experts.down_proj
        return weights.detach().double().square().sum((1, 2))


@register_score
class RandomExperts(ExpertScore):
    """A draw that follows the seed and differs between layers."""

    name = "random"
    help = "draws what is removed, to compare with"
    needs_text = False

    def importance(self, layer: ScoredExperts) -> torch.Tensor:
        """(E,)."""
        import torch

        return torch.rand(layer.count, generator=torch.Generator().manual_seed(layer.seed), dtype=torch.float64)
