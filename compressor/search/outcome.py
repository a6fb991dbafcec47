"""What came out of a search, as all kinds of searches say it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ssmc.compressor.options.goal import Goal
from ssmc.runtime.measure.perplexity import ExcessLoss


def of_loss(loss: ExcessLoss) -> dict[str, Any]:
    """The loss above the dense model's, as a manifest has it."""
    return {"excess_nats": loss.nats, "excess_stderr": loss.stderr, "ppl_increase": math.expm1(loss.nats)}


def rose_too_much(outcome: Mapping[str, Any], goal: Goal) -> str:
    """The sentence on a perplexity above the bound."""
    return (
        f"The perplexity on held-out calibration text rose by {outcome['ppl_increase']:.2%}, more than the "
        f"{goal.max_ppl_increase:.2%} allowed."
    )
