"""What came out of a search, as all kinds of searches say it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ssmc.compressor.distillation.steps import Distillation
from ssmc.compressor.options.goal import Goal
from ssmc.runtime.measure.perplexity import excess_loss, summarise
from ssmc.runtime.measure.recall import far_excess

Losses = tuple[torch.Tensor, torch.Tensor]
"""Windows and the loss of every prediction in them, as `losses_of_tokens` returns them."""

TOLERANCE = 0.10  # how far the time may miss what was asked for


def above(ours: Losses, dense: Losses) -> dict[str, Any]:
    """The loss above the dense model's on the same windows, of all tokens and of far ones, as a manifest has it."""
    loss, far = excess_loss(summarise(*ours), summarise(*dense)), far_excess(ours, dense)
    return {
        "excess_nats": loss.nats,
        "excess_stderr": loss.stderr,
        "ppl_increase": math.expm1(loss.nats),
        "far_nats": None if far is None else far.excess,
        "far_stderr": None if far is None else far.excess_stderr,
    }


def after_steps(done: Distillation, before: float) -> dict[str, Any]:
    """The same of a distilled model, on sequences that no step saw.

    Steps draw their text anew, and may well have seen what the trials were measured on.

    Args:
        done: the distillation.
        before: nats a token above the dense model, before the steps.
    """
    return {
        "excess_nats": done.excess,
        "excess_stderr": None,
        "ppl_increase": math.expm1(done.excess),
        "far_nats": done.excess_far,
        "far_stderr": None,
        "excess_before_steps": before,
    }


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
