"""What a score of layers is, and the step it results in. Nothing here imports torch, see `methods.method`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ssmc.compressor.methods.method import Survey
from ssmc.compressor.options.patterns import LAYER, SSM_MODULE

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Removal:
    """One block, or its SSM, that is removed."""

    layer: int
    loss: float | None = None  # nats a token on the calibration text after this removal, where that was measured
    influence: float | None = None  # `similarity`: how far the block turns what it reads, 0 for not at all


class LayerScore:
    """Which layers are removed. Subclass it and decorate it with `register_score`.

    Attributes:
        name: as `--score` has it.
        help: what it goes by, a phrase.
        decides: about whole blocks, about the SSM of whole blocks, or both.
        needs_text: whether the model is run on text.
    """

    name: ClassVar[str]
    help: ClassVar[str]
    decides: ClassVar[tuple[str, ...]] = (LAYER, SSM_MODULE)
    needs_text: ClassVar[bool] = True

    def choose(self, survey: Survey, count: int, remove: Callable[[nn.Module], None]) -> list[Removal]:
        """The removals, in the order they are made.

        Args:
            survey: the dense model, which must be left as it is, and the calibration samples.
            count: of removals.
            remove: makes one on a block, in place.
        """
        raise NotImplementedError
