"""How many states and channels stay: a sparsity becomes a number that hardware likes, or the user gives the numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ssmc.compressor.methods.weights.masks import check_groups
from ssmc.compressor.options.config import POWER_OF_TWO, SSM, CompressConfig
from ssmc.compressor.options.patterns import CHANNEL, COLUMN, Score
from ssmc.runtime.errors import UsageError
from ssmc.runtime.models.families import Dimensions

LARGEST_REPAIRABLE = 64  # states; the normal matrix has N^4 numbers
MULTIPLES = (64, 32, 16, 8, 4, 2, 1)  # of channels, the most hardware-friendly first
STEPS = 8  # widths to choose between, at least, for a multiple to be the default


@dataclass(frozen=True)
class Kept:
    """What stays in each layer of the dense model; a layer that is removed as a whole is counted as if it stayed."""

    states: tuple[int, ...]
    channels: tuple[int, ...]

    @classmethod
    def everywhere(cls, sizes: Dimensions, states: int | None = None, channels: int | None = None) -> Kept:
        """The same numbers in every layer; None: all there are."""
        return cls((states or sizes.d_state,) * sizes.n_layer, (channels or sizes.d_inner,) * sizes.n_layer)


def kept(config: CompressConfig, sizes: Dimensions) -> Kept:
    """How many states and channels a run keeps in each layer.

    Raises:
        UsageError: nothing would be removed, nothing would stay, or the lists do not fit the model.
    """
    everything = Kept.everywhere(sizes)
    states, channels = everything.states, everything.channels
    if config.nm and SSM in config.targets:
        # groups lie along the states of a channel; a Mamba-2 has one number a head, there they are neighbouring heads
        check_groups(sizes.d_state if sizes.heads is None else sizes.heads // sizes.groups, config.nm)
    if COLUMN in config.parts and SSM in config.targets:
        if sizes.heads is None:  # a Mamba-2 needs N^2
            _check_repairable(config, sizes.d_state)
        states = _listed("states", config.states, sizes.d_state, sizes.n_layer) or (
            (kept_states(sizes.d_state, config.sparsity_of(COLUMN), config.round_to),) * sizes.n_layer
        )
    if CHANNEL in config.parts:
        channels = _listed("widths", config.widths, sizes.d_inner, sizes.n_layer) or (
            (_kept_width(config, sizes),) * sizes.n_layer
        )
        if sizes.heads is not None:
            _check_heads(config, sizes, channels)
    return Kept(states, channels)


def kept_states(d_state: int, sparsity: float, round_to: int | str = 1) -> int:
    """How many of `d_state` states stay: the nearest whole number, then the nearest allowed one, ties to fewer.

    Args:
        d_state: N of the dense model.
        sparsity: part that is removed, inside (0, 1).
        round_to: a number K must be a multiple of, or "power-of-two".

    Raises:
        UsageError: nothing would be removed, or nothing would stay.
    """
    wanted = d_state * (1 - sparsity)
    if round_to == POWER_OF_TWO:
        allowed = [2**e for e in range(int(math.log2(d_state)) + 1)]
    else:
        allowed = list(range(round_to, d_state + 1, round_to))
    if not allowed:
        raise UsageError(f"round_to {round_to} is more than the {d_state} states there are. Use a smaller one.")
    nearest = _nearest(allowed, wanted)
    if round_to == 1 and wanted < 0.5:
        raise UsageError(
            f"sparsity {sparsity} of {d_state} states would leave none; the most is {1 - 1 / d_state:g} (one state)."
        )
    if nearest == d_state:
        raise UsageError(
            f"sparsity {sparsity} of {d_state} states, rounded to {round_to}, removes none; "
            f"use at least {1 / d_state:g} or another round_to."
        )
    return nearest


def kept_channels(d_inner: int, sparsity: float, multiple: int | None = None) -> int:
    """How many of `d_inner` channels stay: the multiple nearest to what the sparsity leaves, ties to fewer.

    Args:
        d_inner: D of the dense model.
        sparsity: part that is removed, inside (0, 1).
        multiple: what the width is a multiple of; None: see `default_multiple`.

    Raises:
        UsageError: nothing would be removed, or there is no such multiple.
    """
    multiple = multiple or default_multiple(d_inner)
    allowed = [*range(multiple, d_inner, multiple), d_inner]
    nearest = _nearest(allowed, d_inner * (1 - sparsity))
    if nearest == d_inner:
        smaller = ", ".join(str(m) for m in MULTIPLES if m < multiple)
        raise UsageError(
            f"sparsity {sparsity} of {d_inner} channels, rounded to a multiple of {multiple}, removes none; "
            f"use a higher one{f', or --round-channels with a smaller number ({smaller})' if smaller else ''}."
        )
    return nearest


def widths_of_heads(sizes: Dimensions) -> list[int]:
    """The widths below its own that a Mamba-2 can have in a stock loader, rising.

    transformers and mamba_ssm have one width for all layers, `expand` times d_model with a whole `expand` (a fraction
    is refused by Mamba2Config, and gives a layer of fractional size in mamba_ssm), and whole heads in every group.
    """
    unit = sizes.groups * sizes.head_dim
    return [width for width in range(sizes.d_model, sizes.d_inner, sizes.d_model) if width % unit == 0]


def _kept_width(config: CompressConfig, sizes: Dimensions) -> int:
    sparsity = config.sparsity_of(CHANNEL)
    if sizes.heads is None:
        return kept_channels(sizes.d_inner, sparsity, config.round_channels)
    wanted = sizes.d_inner * (1 - sparsity)
    return _nearest([*widths_of_heads(sizes), sizes.d_inner], wanted)


def _check_heads(config: CompressConfig, sizes: Dimensions, widths: Sequence[int]) -> None:
    """Refuse widths that no stock loader takes, rather than remove far more or less than was asked for."""
    able = widths_of_heads(sizes)
    why = (
        f"stock loaders want a whole `expand`, that is a width of whole heads that is a multiple of d_model "
        f"{sizes.d_model}, in every layer"
    )
    if not able:
        raise UsageError(f"No heads can be removed from this model of {sizes.d_inner} channels: {why}.")
    P = sizes.head_dim
    choices = ", ".join(f"{width} ({width // P} heads, sparsity {1 - width / sizes.d_inner:.4g})" for width in able)
    if config.round_channels is not None:
        raise UsageError(f"round_channels does not go with the heads of a Mamba-2, as {why}: {choices}.")
    asked = config.widths is not None or abs(widths[0] - sizes.d_inner * (1 - config.sparsity_of(CHANNEL))) <= P / 2
    if not asked or any(width not in able for width in widths) or len(set(widths)) > 1:
        what = "widths" if config.widths is not None else f"sparsity {config.sparsity_of(CHANNEL):g}"
        raise UsageError(
            f"The {what} of {sizes.d_inner} channels ({sizes.heads} heads) cannot be exported: {why}. "
            f"What can be: {choices}."
        )


def default_multiple(d_inner: int) -> int:
    """64 channels, what matrix products on all hardware like, or the largest smaller power of two with enough steps."""
    return next((m for m in MULTIPLES if d_inner >= STEPS * m), 1)


def _check_repairable(config: CompressConfig, d_state: int) -> None:
    if d_state > LARGEST_REPAIRABLE and (config.repair or config.judge_of(COLUMN) is Score.exact):
        raise UsageError(
            f"The repair and the score exact keep N^4 numbers a layer, too many for d_state {d_state} (at most "
            f"{LARGEST_REPAIRABLE}). Use --score energy --no-repair."
        )


def _nearest(allowed: Sequence[int], wanted: float) -> int:
    return min(allowed, key=lambda k: (abs(k - wanted), k))


def _listed(name: str, counts: tuple[int, ...] | None, most: int, layers: int) -> tuple[int, ...] | None:
    """The user's own numbers, one a layer, once they fit the model."""
    if counts is None:
        return None
    if len(counts) != layers:
        raise UsageError(f"{name} names {len(counts)} layers, the model has {layers}. Give one number for each.")
    if max(counts) > most:
        raise UsageError(f"{name} keeps {max(counts)} in a layer that has {most}. Use at most {most}.")
    return counts
