"""How many states stay: a sparsity becomes a number that runtimes like, or the user gives the numbers."""

from __future__ import annotations

import math

from ssmc.compressor.methods.counts import listed, nearest
from ssmc.compressor.methods.method import Plan
from ssmc.compressor.options.patterns import COLUMN
from ssmc.runtime.errors import UsageError

LARGEST_REPAIRABLE = 64  # states; the normal matrix has N^4 numbers


def states_of_layers(plan: Plan) -> tuple[int, ...]:
    """How many states a run keeps in each layer.

    Raises:
        UsageError: nothing would be removed, nothing would stay, or the list does not fit the model.
    """
    config, sizes = plan.config, plan.sizes
    if not plan.has_heads:  # a Mamba-2 needs N^2
        _check_repairable(plan)
    if config.states is not None:
        return listed("states", config.states, sizes.d_state, sizes.n_layer)
    return (states_to_keep(sizes.d_state, config.sparsity_of(COLUMN), config.round_to),) * sizes.n_layer


def states_to_keep(d_state: int, sparsity: float, round_to: int | str = 1) -> int:
    """How many of `d_state` states stay: the nearest whole number, then the nearest allowed one, ties to fewer.

    Args:
        d_state: N of the dense model.
        sparsity: part that is removed, inside (0, 1).
        round_to: a number K must be a multiple of, or "power-of-two".

    Raises:
        UsageError: nothing would be removed, or nothing would stay.
    """
    if d_state == 1:
        raise UsageError("There is only one state, and the last one cannot go. Remove channels: the pattern channel.")
    wanted = d_state * (1 - sparsity)
    allowed = allowed_states(d_state, round_to)
    if not allowed:
        raise UsageError(f"round_to {round_to} is more than the {d_state} states there are. Use a smaller one.")
    kept = nearest(allowed, wanted)
    if round_to == 1 and wanted < 0.5:
        raise UsageError(
            f"sparsity {sparsity} of {d_state} states would leave none; the most is {1 - 1 / d_state:g} (one state)."
        )
    if kept == d_state:
        raise UsageError(
            f"sparsity {sparsity} of {d_state} states, rounded to {round_to}, removes none; "
            f"use at least {1 / d_state:g} or another round_to."
        )
    return kept


def _check_repairable(plan: Plan) -> None:
    config, d_state = plan.config, plan.sizes.d_state
    if d_state > LARGEST_REPAIRABLE and (config.repair or config.score_of(COLUMN) == "exact"):
        raise UsageError(
            f"The repair and the score exact keep N^4 numbers a layer, too many for d_state {d_state} (at most "
            f"{LARGEST_REPAIRABLE}). Use the score energy without repair."
        )


def allowed_states(d_state: int, round_to: int | str) -> list[int]:
    """The numbers of states that rounding leaves, up to all of them, rising; arguments as of `states_to_keep`."""
    if isinstance(round_to, str):
        return [2**e for e in range(int(math.log2(d_state)) + 1)]
    return list(range(round_to, d_state + 1, round_to))
