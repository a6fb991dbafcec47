"""What came out of a search, as all kinds of searches say it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ssmc.compressor.options.goal import Goal
from ssmc.runtime.measure.perplexity import ExcessLoss

TOLERANCE = 0.10  # how far the time may miss what was asked for


def of_loss(loss: ExcessLoss) -> dict[str, Any]:
    """The loss above the dense model's, as a manifest has it."""
    return {"excess_nats": loss.nats, "excess_stderr": loss.stderr, "ppl_increase": math.expm1(loss.nats)}


def rose_too_much(outcome: Mapping[str, Any], goal: Goal) -> str:
    """The sentence on a perplexity above the bound."""
    return (
        f"The perplexity on held-out calibration text rose by {outcome['ppl_increase']:.2%}, more than the "
        f"{goal.max_ppl_increase:.2%} allowed."
    )


def missed(outcome: Mapping[str, Any], goal: Goal, most_nats: float) -> list[str]:
    """In what an outcome is not what was asked for, in sentences; empty: it is.

    Args:
        outcome: the loss above the dense model's, and where it was timed the share of its time.
        goal: what was asked for.
        most_nats: the bound of the loss.
    """
    if outcome["excess_nats"] > most_nats:
        return [rose_too_much(outcome, goal)]
    if goal.target_latency is not None and outcome["time"] > goal.target_latency * (1 + TOLERANCE):
        return [
            f"The goal was missed: the model takes {outcome['time']:.3f} of the dense one's time, "
            f"{goal.target_latency:.3f} were asked for."
        ]
    return []
