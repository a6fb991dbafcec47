"""What a score of states is: what it must collect, and how important it finds every state.

Nothing here imports torch, see `methods.method`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from ssmc.compressor.options.patterns import COLUMN, UNSTRUCTURED
from ssmc.compressor.options.sparsity import Sparsity

if TYPE_CHECKING:
    import torch

    from ssmc.compressor.methods.method import Plan
    from ssmc.compressor.methods.states.statistics import Statistic
    from ssmc.compressor.methods.states.sums import Request


@dataclass(frozen=True)
class ScoredGroup:
    """What a score may look at: a layer, or one group of heads of it, which has B and C of its own.

    Attributes:
        index: of the layer.
        A_log: (D, N).
        sums: what was collected for the score, by name, see `states.sums.STATISTICS`.
        repair: whether the choice will be repaired.
        seed: of the run.
    """

    index: int
    A_log: torch.Tensor
    sums: Mapping[str, Any] = field(default_factory=dict)
    repair: bool = False
    seed: int = 0


class StateScore:
    """How important states are, and single entries of A_log. Subclass it and decorate it with `register_score`.

    A score must have a name, a help text and `importance`; the rest has defaults that suit most.

    Attributes:
        name: as `--score` has it.
        help: what it goes by, a phrase.
        needs: names of the sums it looks at, see `states.sums.STATISTICS`; for sums of its own a score overrides
            `statistics`.
        decides: about whole states, about single entries of A_log, or both.
        needs_text: whether the model is run on text.
        streams: whether its sums take the text batch after batch; else all samples of a time step must be together.
    """

    name: ClassVar[str]
    help: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    decides: ClassVar[tuple[str, ...]] = (COLUMN, UNSTRUCTURED)
    needs_text: ClassVar[bool] = True
    streams: ClassVar[bool] = True

    def refusal(self, plan: Plan) -> str | None:
        """Why this score cannot decide for this run, a sentence or two; None: it can."""
        return None

    def statistics(self, request: Request) -> dict[str, Statistic]:
        """Empty sums over the hidden states of a layer, to be filled on the calibration text."""
        from ssmc.compressor.methods.states.sums import STATISTICS

        return {name: STATISTICS[name](request) for name in self.needs}

    def importance(self, group: ScoredGroup) -> torch.Tensor:
        """Of every entry of A_log, (D, N); what is least important is removed."""
        raise NotImplementedError

    def of_states(self, group: ScoredGroup) -> torch.Tensor:
        """Of every state, (N,): the entries summed over channels, unless the score has a rule of its own."""
        return self.importance(group).sum(0)

    def of_heads(self, groups: Sequence[ScoredGroup], heads: int) -> torch.Tensor:
        """Of every head of a Mamba-2, (H,): its entries summed over its channels and states.

        Args:
            groups: of the layer.
            heads: of one group.
        """
        import torch

        from ssmc.compressor.methods.states.ranking import by_head

        return torch.cat([by_head(self.importance(group), heads) for group in groups])

    def choose(self, group: ScoredGroup, keep: int) -> list[int]:
        """The states that stay, ascending."""
        from ssmc.compressor.methods.states.ranking import highest

        return highest(self.of_states(group), keep)

    def pruned_entries(self, group: ScoredGroup, sparsity: Sparsity) -> torch.Tensor:
        """A_log (D, N) with entries set to 0, that is A = -1.

        Args:
            group: a whole layer of a Mamba-1.
            sparsity: over all entries, or N:M along the states.
        """
        from ssmc.compressor.methods.states.ranking import entry_mask

        return group.A_log * entry_mask(self.importance(group).to(group.A_log.device), sparsity)
