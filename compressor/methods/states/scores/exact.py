"""`exact`: the error of losing a set of states, repaired if it will be, by backward elimination."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssmc.compressor.methods.registry import register_score
from ssmc.compressor.methods.states.score import ScoredGroup, StateScore
from ssmc.compressor.options.patterns import COLUMN

if TYPE_CHECKING:
    from ssmc.compressor.methods.states.statistics import Statistic
    from ssmc.compressor.methods.states.sums import Request


@register_score
class Exact(StateScore):
    """Takes away the state whose loss hurts least after the repair, one after the other."""

    name = "exact"
    help = "removes the states whose loss the repair makes up for best"
    decides = (COLUMN,)

    def statistics(self, request: Request) -> dict[str, Statistic]:
        """The matrix from which the error of any set follows: of C rows that can be mixed, or of scales."""
        from ssmc.compressor.methods.states.sums import STATISTICS

        name = "normal" if request.heads is None else "contributions"
        return {name: STATISTICS[name](request)}

    def choose(self, group: ScoredGroup, keep: int) -> list[int]:
        """The states that stay, ascending."""
        from ssmc.compressor.methods.states.elimination import eliminate, eliminate_from, eliminate_scaled, exchange

        if contributions := group.sums.get("contributions"):
            errors = contributions.errors(group.repair)
            # scales of what stays stand in for the refit of C rows, which is no least-squares problem
            return eliminate_scaled(errors, keep) if group.repair else eliminate_from(errors, keep)
        normal = group.sums["normal"].dense()
        chosen = eliminate(normal, keep, group.repair)
        return exchange(normal, chosen) if group.repair else chosen
