"""What a score of the weights of a module is. Nothing here imports torch, see `methods.method`."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol

from ssmc.compressor.options.patterns import WEIGHTS
from ssmc.compressor.options.sparsity import Sparsity

if TYPE_CHECKING:
    import torch


class Moment(Protocol):
    """Second moments of what a module reads: `second_moments.SecondMoment`, of conv1d `DepthwiseSecondMoment`."""

    @property
    def total(self) -> torch.Tensor:
        """(in, in), or (D, K, K) of a depthwise conv1d with K taps."""

    def add(self, x: torch.Tensor) -> None:
        """Take in what the module reads."""

    def pool(self) -> None:
        """Add what the other processes saw."""


class WeightScore:
    """How the weights of projections and of conv1d are pruned. Subclass it and decorate it with `register_score`.

    Attributes:
        name: as `--ffn-score` has it.
        help: what it goes by, a phrase.
        needs_text: whether it looks at what the module reads.
    """

    name: ClassVar[str]
    help: ClassVar[str]
    decides: ClassVar[tuple[str, ...]] = (WEIGHTS,)
    needs_text: ClassVar[bool] = True

    def prune(
        self, weight: torch.Tensor, moment: Moment | None, sparsity: Sparsity
    ) -> tuple[torch.Tensor, float | None]:
        """The pruned weight, and its relative output error where it is known.

        Args:
            weight: (out, in), or (D, K) of a depthwise conv1d; not to be modified.
            moment: of what the module reads; None for a score that looks at no text.
            sparsity: the part that goes, or N:M along the inputs.
        """
        raise NotImplementedError
