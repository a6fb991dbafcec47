"""A run fitted to the runtime its result is for: numbers that it takes and gains from, or a refusal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssmc.compressor.options.config import CompressConfig
from ssmc.compressor.options.patterns import CHANNEL, COLUMN, WIDTH
from ssmc.runtime.errors import UsageError
from ssmc.runtime.models.consumers import (
    TWICE,
    computes_otherwise,
    consumer_named,
    lasting_misfit,
    refuse_family,
)

if TYPE_CHECKING:
    from ssmc.runtime.models.checkpoints import Checkpoint


def fitted(config: CompressConfig, checkpoint: Checkpoint) -> CompressConfig:
    """The run with the rounding of states that its runtime wants, unless the user chose another that will do.

    Args:
        config: what was asked for.
        checkpoint: the dense model.

    Raises:
        UsageError: the runtime does not take the model, or what the pattern leaves of it.
    """
    if config.runtime is None:
        return config
    sizes = checkpoint.dimensions
    refuse_family(config.runtime, checkpoint.architecture)
    rule = consumer_named(config.runtime).rule(sizes)
    if CHANNEL in config.parts and WIDTH not in config.parts and rule.width == TWICE:
        both = f"use --pattern {CHANNEL}+{WIDTH}, which removes as large a part of both, or "
        both = "" if checkpoint.architecture.capabilities.whole_expand else both  # of a Jamba they do not go together
        raise UsageError(
            f"{config.runtime} takes a d_inner of 2 x d_model only, so no channels can go by themselves: {both}leave "
            f"{CHANNEL} out of --pattern."
        )
    wrong = computes_otherwise(config.runtime, checkpoint.architecture, checkpoint.config, wrong=True)
    reason = lasting_misfit(config.runtime, sizes, getattr(checkpoint.config, "layer_norm_epsilon", None))
    if reason := wrong or (None if CHANNEL in config.parts else reason):
        raise UsageError(
            f"{config.runtime} does not run this model, pruned or not: {reason}. Leave out --for, or choose another."
        )
    if COLUMN not in config.parts or rule.states == 1:
        return config
    if "round_to" not in config.model_fields_set:
        return config.model_copy(update={"round_to": rule.states})
    chosen = config.round_to
    if not rule.padded and isinstance(rule.states, int) and (isinstance(chosen, str) or chosen % rule.states):
        raise UsageError(
            f"{config.runtime} takes states in multiples of {rule.states} only. Leave --round-to out, or use "
            f"{rule.states}."
        )
    return config
