"""What a score of experts is. Nothing here imports torch, see `methods.method`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ssmc.compressor.options.patterns import EXPERT

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ssmc.runtime.models.architectures.experts import Mixture


@dataclass(frozen=True)
class ScoredExperts:
    """What a score may look at.

    Attributes:
        part: what the mixture is.
        module: in the block.
        hidden: (T, d_model) what it reads; None for scores that look at no text.
        beside: (T, n) what linear maps read that add to the same residual stream and are refitted; None: there are
            none.
        seed: of this layer.
    """

    part: Mixture
    module: nn.Module
    hidden: torch.Tensor | None = None
    beside: torch.Tensor | None = None
    seed: int = 0

    @property
    def tokens(self) -> torch.Tensor:
        """What the mixture reads, where there must be text."""
        if self.hidden is None:
            raise ValueError("this score looks at text")
        return self.hidden

    @property
    def count(self) -> int:
        """How many experts there are."""
        return len(self.module.experts.down_proj)


class ExpertScore:
    """How important experts are. Subclass it and decorate it with `register_score`.

    A score must have a name, a help text and `importance`, or a `choose` of its own.

    Attributes:
        name: as `--score` has it.
        help: what it goes by, a phrase.
        needs_text: whether it looks at `ScoredExperts.hidden`.
    """

    name: ClassVar[str]
    help: ClassVar[str]
    decides: ClassVar[tuple[str, ...]] = (EXPERT,)
    needs_text: ClassVar[bool] = True

    def importance(self, layer: ScoredExperts) -> torch.Tensor:
        """Of every expert, (E,); what is least important is removed."""
        raise NotImplementedError

    def choose(self, layer: ScoredExperts, keep: int, groups: int = 1) -> list[int]:
        """The experts that stay, ascending, `keep` of them and as many of each group."""
        from ssmc.compressor.methods.channels.heads import highest_of_each_group

        return highest_of_each_group(self.importance(layer).cpu(), keep, groups)
