"""The built-in scores of directions of the residual stream, registered when this is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssmc.compressor.methods.registry import register_score
from ssmc.compressor.methods.width.score import CoordinateScore, StreamMoments, WidthScore

if TYPE_CHECKING:
    import torch


@register_score
class Fisher(WidthScore):
    """What cutting costs the predictions, to second order, at all norms together; see `directions`."""

    name = "fisher"
    help = (
        "turns the stream so that what goes costs the predictions of the whole model least; takes gradients of the "
        "dense model"
    )
    needs_cost = True

    def basis(self, moments: StreamMoments, keep: int) -> torch.Tensor:
        """By descent on the sum of both moments' products, from the principal components."""
        from ssmc.compressor.methods.width.directions import least_cost_directions

        if moments.cost is None:
            raise ValueError("this score takes gradients of the dense model")
        return least_cost_directions(moments.read, moments.cost, keep)


@register_score
class PrincipalComponents(WidthScore):
    """SliceGPT (2401.15024), with one rotation for the whole model."""

    name = "pca"
    help = "turns the stream into its principal components and removes the smallest"

    def basis(self, moments: StreamMoments, keep: int) -> torch.Tensor:
        """Of what all norms put out, added up."""
        from ssmc.compressor.methods.width.directions import principal_directions

        return principal_directions(moments.read.sum(0))[:, :keep]


@register_score
class Activation(CoordinateScore):
    """Mean squares of the coordinates."""

    name = "activation"
    help = "turns nothing and removes the coordinates of the stream that are smallest"

    def importance(self, moments: StreamMoments) -> torch.Tensor:
        """(D,)."""
        return moments.read.sum(0).diagonal()


@register_score
class Minitron(CoordinateScore):
    """Minitron (2407.14679): the norm over samples of the mean absolute values behind the norms, all added up."""

    name = "minitron"
    help = "removes what is least active, whatever is read from it"

    def importance(self, moments: StreamMoments) -> torch.Tensor:
        """(D,)."""
        return moments.means


@register_score
class CoordinateMagnitude(CoordinateScore):
    """Squared sizes of the weights."""

    name = "magnitude"
    help = "goes by the size of all weights that a coordinate of the stream has and looks at no text"
    needs_text = False

    def importance(self, moments: StreamMoments) -> torch.Tensor:
        """(D,)."""
        return moments.sizes


@register_score
class RandomCoordinates(CoordinateScore):
    """A draw that follows the seed."""

    name = "random"
    help = "draws what is removed, to compare with"
    needs_text = False

    def importance(self, moments: StreamMoments) -> torch.Tensor:
        """(D,)."""
        import torch

        generator = torch.Generator().manual_seed(moments.seed)
        return torch.rand(len(moments.sizes), generator=generator, dtype=torch.float64)
