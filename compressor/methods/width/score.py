"""What a score of directions of the residual stream is. Nothing here imports torch, see `methods.method`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ssmc.compressor.options.patterns import WIDTH

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class StreamMoments:
    """Second moments of the dense model's residual stream, a token; each (S, D, D) float64, S the norms that read it.

    Attributes:
        read: of what the norms put out, without their weights.
        cost: of the gradients there, for tokens drawn from the model's own predictions; None where none were taken.
        stream: of the gradients of the stream itself, before each norm; None likewise.
        means: (D,) norm over samples of the mean over tokens of |what the norms put out|, all norms together.
        sizes: (D,) squared size of all that is multiplied by a coordinate of the stream, or added to it.
        seed: of the run.
    """

    read: torch.Tensor
    cost: torch.Tensor | None
    stream: torch.Tensor | None
    means: torch.Tensor
    sizes: torch.Tensor
    seed: int = 0


class WidthScore:
    """Which directions of the residual stream stay. Subclass it and decorate it with `register_score`.

    Attributes:
        name: as `--score` has it.
        help: what it goes by, a phrase.
        needs_text: whether the model is run on text.
        needs_cost: whether it looks at `StreamMoments.cost`, which takes gradients of the dense model.
    """

    name: ClassVar[str]
    help: ClassVar[str]
    decides: ClassVar[tuple[str, ...]] = (WIDTH,)
    needs_text: ClassVar[bool] = True
    needs_cost: ClassVar[bool] = False

    def basis(self, moments: StreamMoments, keep: int) -> torch.Tensor:
        """Orthonormal columns (D, keep), what they span is what stays."""
        raise NotImplementedError


class CoordinateScore(WidthScore):
    """A score that turns nothing: some of the coordinates stay as they are."""

    def importance(self, moments: StreamMoments) -> torch.Tensor:
        """Of every coordinate, (D,); what is least important is removed."""
        raise NotImplementedError

    def basis(self, moments: StreamMoments, keep: int) -> torch.Tensor:
        """Columns of the unit matrix."""
        import torch

        kept = self.importance(moments).argsort(descending=True, stable=True)[:keep].sort().values
        return torch.eye(len(moments.sizes), dtype=torch.float64)[:, kept.cpu()].to(moments.read.device)
