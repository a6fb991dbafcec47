"""How many channels, or heads of a Mamba-2, stay: a sparsity becomes a number that hardware and stock loaders take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from ssmc.compressor.methods.counts import MULTIPLES, default_multiple, listed, nearest
from ssmc.compressor.methods.method import Plan
from ssmc.compressor.methods.width.counts import shape_to_keep
from ssmc.compressor.options.config import CompressConfig
from ssmc.compressor.options.patterns import CHANNEL, HEAD, HEAD_DIM, WIDTH
from ssmc.runtime.errors import UsageError
from ssmc.runtime.models.consumers import HEADS, consumer_named

if TYPE_CHECKING:
    from ssmc.runtime.models.architectures.dimensions import Mamba2Dimensions
    from ssmc.runtime.models.families import Architecture, Dimensions


def channels_of_layers(plan: Plan) -> tuple[int, ...]:
    """How many channels a run keeps in each layer.

    Raises:
        UsageError: nothing would be removed, or the numbers do not fit the model or its stock loaders.
    """
    config, sizes = plan.config, plan.sizes
    if plan.architecture.capabilities.whole_expand and {CHANNEL, WIDTH} <= set(config.parts):
        raise UsageError(
            f"channel and width of {plan.architecture.model_type} do not go together: d_inner is a multiple of "
            "d_model. Use one of them."
        )
    if WIDTH in config.parts and (shape := shape_to_keep(plan)) is not None:
        return (shape.heads * (1 if sizes.heads is None else sizes.d_inner // sizes.heads),) * sizes.n_layer
    if HEAD in config.parts:
        return (_heads_to_keep(plan) * cast("Mamba2Dimensions", sizes).head_dim,) * sizes.n_layer
    if plan.architecture.capabilities.whole_expand and CHANNEL in config.parts:
        return _whole_widths(plan)
    if config.widths is not None:
        channels = listed("widths", config.widths, sizes.d_inner, sizes.n_layer)
    else:
        channels = (_kept_width(config, sizes),) * sizes.n_layer
    if plan.has_heads and CHANNEL in config.parts:
        _check_heads(config, sizes, channels)
    return channels


def _whole_widths(plan: Plan) -> tuple[int, ...]:
    """How many channels stay in each layer where the widest must be a whole multiple of d_model.

    Raises:
        UsageError: naming what can be.
    """
    config, sizes = plan.config, plan.sizes
    able = list(range(sizes.d_model, sizes.d_inner, sizes.d_model))
    why = f"the configuration of {plan.architecture.model_type} has d_inner as a multiple of d_model {sizes.d_model}"
    choices = ", ".join(f"{width} (sparsity {1 - width / sizes.d_inner:.3g})" for width in able) or "no other width"
    if config.widths is not None:
        channels = listed("widths", config.widths, sizes.d_inner, sizes.n_layer)
        if max(channels) in able:
            return channels
        raise UsageError(
            f"The widths of {sizes.d_inner} channels cannot be exported: {why}. The widest can be {choices}."
        )
    kept = nearest([*able, sizes.d_inner], sizes.d_inner * (1 - config.sparsity_of(CHANNEL)))
    if kept == sizes.d_inner or (config.round_channels and kept % config.round_channels):
        asked = "" if config.round_channels is None else f", rounded to {config.round_channels},"
        raise UsageError(
            f"sparsity {config.sparsity_of(CHANNEL):g} of {sizes.d_inner} channels{asked} cannot be had: {why}. "
            f"What can be: {choices}."
        )
    return (kept,) * sizes.n_layer


def channels_to_keep(d_inner: int, sparsity: float, multiple: int | None = None) -> int:
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
    kept = nearest(allowed, d_inner * (1 - sparsity))
    if kept == d_inner:
        smaller = ", ".join(str(m) for m in MULTIPLES if m < multiple)
        raise UsageError(
            f"sparsity {sparsity} of {d_inner} channels, rounded to a multiple of {multiple}, removes none; "
            f"use a higher one{f', or a smaller round_channels ({smaller})' if smaller else ''}."
        )
    return kept


def widths_of_heads(sizes: Dimensions, runtime: str | None = None) -> list[int]:
    """The widths below its own that a Mamba-2 can have in a stock loader, or in that runtime, rising.

    transformers and mamba_ssm have one width for all layers, `expand` times d_model with a whole `expand` (a fraction
    is refused by Mamba2Config, and gives a layer of fractional size in mamba_ssm), and whole heads in every group.
    """
    unit = sizes.groups * cast("Mamba2Dimensions", sizes).head_dim
    step = unit if _takes_any_heads(sizes, runtime) else sizes.d_model
    return [width for width in range(step, sizes.d_inner, step) if width % unit == 0]


def able_widths(architecture: Architecture, sizes: Mamba2Dimensions, runtime: str | None = None) -> list[int]:
    """The widths of whole heads that a run may leave, rising, below that of the dense model."""
    if architecture.capabilities.free_width:
        return list(range(sizes.head_dim * sizes.groups, sizes.d_inner, sizes.head_dim * sizes.groups))
    return widths_of_heads(sizes, runtime)


def _heads_to_keep(plan: Plan) -> int:
    """How many heads stay: the number nearest to what the sparsity leaves, of those a loader takes.

    Raises:
        UsageError: none can go, or none would.
    """
    sizes, sparsity = cast("Mamba2Dimensions", plan.sizes), plan.config.sparsity_of(HEAD)
    able = [width // sizes.head_dim for width in able_widths(plan.architecture, sizes, plan.config.runtime)]
    if not able:
        raise UsageError(f"No heads can be removed from this model of {sizes.heads}: {_why(plan)}.")
    kept = nearest([*able, sizes.heads], sizes.heads * (1 - sparsity))
    if kept == sizes.heads:
        least = sizes.heads - able[-1]
        raise UsageError(
            f"sparsity {sparsity:g} of {sizes.heads} heads removes none; the least that can go is {least}, a sparsity "
            f"of {least / sizes.heads:.3g}: {_why(plan)}."
        )
    return kept


def head_dim_to_keep(plan: Plan) -> int:
    """How many channels stay in every head that does: as `_heads_to_keep`.

    Raises:
        UsageError: none can go, or none would.
    """
    if WIDTH in plan.config.parts and (shape := shape_to_keep(plan)) is not None:
        return shape.head_dim
    sizes, sparsity = cast("Mamba2Dimensions", plan.sizes), plan.config.sparsity_of(HEAD_DIM)
    heads, able = plan.keep.channels[0] // sizes.head_dim, list(range(1, sizes.head_dim))
    if not plan.architecture.capabilities.free_width and not _takes_any_heads(sizes, plan.config.runtime):
        able = [p for p in able if heads * p % sizes.d_model == 0]
    kept = nearest([*able, sizes.head_dim], sizes.head_dim * (1 - sparsity))
    if kept == sizes.head_dim:
        rest = f"the least is a sparsity of {1 - able[-1] / sizes.head_dim:.3g}: " if able else ""
        raise UsageError(
            f"A sparsity of {sparsity:g} takes no channels out of heads of {sizes.head_dim}, {heads} of them: {rest}"
            f"{_why(plan)}. Leave {HEAD_DIM} out of --pattern, or remove heads."
        )
    return kept


def _why(plan: Plan) -> str:
    if plan.architecture.capabilities.free_width or _takes_any_heads(plan.sizes, plan.config.runtime):
        return "as many heads stay in every group"
    return f"stock loaders want a width of whole heads that is a multiple of d_model {plan.sizes.d_model}"


def _takes_any_heads(sizes: Dimensions, runtime: str | None) -> bool:
    return runtime is not None and consumer_named(runtime).rule(sizes).width == HEADS


def _kept_width(config: CompressConfig, sizes: Dimensions) -> int:
    sparsity = config.sparsity_of(CHANNEL)
    if sizes.heads is None:
        return channels_to_keep(sizes.d_inner, sparsity, config.round_channels)
    wanted = sizes.d_inner * (1 - sparsity)
    return nearest([*widths_of_heads(sizes, config.runtime), sizes.d_inner], wanted)


def _check_heads(config: CompressConfig, sizes: Dimensions, widths: Sequence[int]) -> None:
    """Refuse widths that no stock loader takes, rather than remove far more or less than was asked for."""
    able = widths_of_heads(sizes, config.runtime)
    why = (
        f"stock loaders want a whole `expand`, that is a width of whole heads that is a multiple of d_model "
        f"{sizes.d_model}, in every layer"
    )
    if _takes_any_heads(sizes, config.runtime):
        why = f"{config.runtime} wants whole heads, as many in each group and in every layer"
    if not able:
        raise UsageError(f"No heads can be removed from this model of {sizes.d_inner} channels: {why}.")
    P = cast("Mamba2Dimensions", sizes).head_dim
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
