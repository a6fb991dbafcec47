"""The last part of a search that may give each layer sizes of its own: measure who matters, share out, try, compare."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ssmc.compressor.options.goal import configured
from ssmc.compressor.options.patterns import CHANNEL, COLUMN
from ssmc.compressor.pipeline import each_alone
from ssmc.compressor.search.allocation import ROUNDS, Limit, LossModel, Sizes, cheapest_within
from ssmc.compressor.search.layer_sizes import BlockLimit, LayerLosses, Layerwise, allocate, shared_out
from ssmc.runtime.measure.losses import divergence, last_hidden
from ssmc.runtime.models.fast import use_fast_scan

if TYPE_CHECKING:
    from ssmc.compressor.search.trials import Search

PROBES = 4  # samples a layer alone is pruned on, and as many that its divergence is measured on
FASTER = (
    0.8,
    0.85,
    0.9,
    0.95,
    1.0,
)  # times the uniform model's time that are tried when as fast as can be is asked for


def find_layerwise(
    search: Search, uniform: Sizes, limits: Sequence[Limit], model: LossModel
) -> tuple[Sizes | Layerwise, LayerLosses]:
    """Better sizes than the uniform ones that were found, or those.

    Args:
        search: with the uniform part of it done.
        uniform: what that found.
        limits: of parameters and time; none where only the perplexity is bounded.
        model: its losses.

    Returns:
        The sizes, and what the layers' losses are taken to be.
    """
    losses = layer_losses(search, uniform, model)
    if limits:
        found = [_within(search, losses, limits, *sizes) for sizes in _choices(search, uniform, model)]
        candidates = [uniform, *_new(found, uniform)]
        return min(candidates, key=search.try_out), losses
    time, sizes = search.share_of_time(uniform), next(_choices(search, uniform, model))
    faster = [_within(search, losses, [Limit("time", search.share_of_time, part * time)], *sizes) for part in FASTER]
    candidates = [*_new(faster, uniform), uniform]
    best = cheapest_within(candidates, search.try_out, search.target.most_nats, len(candidates) // 2)
    return best or uniform, losses


def _new(found: Sequence[Layerwise | None], uniform: Sizes) -> list[Layerwise]:
    """What was found, each once, and not the uniform model again."""
    return [sizes for sizes in dict.fromkeys(found) if sizes is not None and sizes.blocks() != uniform.blocks()]


def layer_losses(search: Search, uniform: Sizes, model: LossModel) -> LayerLosses:
    """What each layer costs when it alone is pruned: how far the predictions move, on a few samples."""
    shares = uniform.removed(search.dense)
    weights = {}
    for part in (COLUMN, CHANNEL):
        if part in search.config.parts:
            share = min(model.curves[part].shares, key=lambda s: abs(s - shares.get(part, s)))
            weights[part] = shared_out([*_divergences(search, part, share)])
    return LayerLosses(search.dense, {part: model.curves[part] for part in weights}, weights)


def _divergences(search: Search, part: str, share: float) -> Iterator[float]:
    checkpoint, samples = search.checkpoint, search.samples
    config = configured(search.config, {part: share}, trial=True)
    held = samples.held_out[:PROBES]
    dense = last_hidden(checkpoint.model, held)
    fit = samples.fit[:PROBES].to(checkpoint.model.device)
    probes = each_alone(
        checkpoint.model, checkpoint.architecture, fit, config, checkpoint.dtypes, progress=search.progress
    )
    for _ in probes:
        yield divergence(dense, use_fast_scan(checkpoint.model), held)


def _choices(search: Search, uniform: Sizes, model: LossModel) -> Iterator[tuple[list[int], list[int]]]:
    """What layers may choose between, (widths, numbers of states), as far down as the curves were measured: both, and
    one of the two as in the uniform model."""
    widths, states = search.allowed()
    least = {part: 1 - curve.shares[-1] for part, curve in model.curves.items()}
    widths = [w for w in widths if w >= least.get(CHANNEL, 1) * search.dense.d_inner - 1e-9]
    states = [n for n in states if n >= least.get(COLUMN, 1) * search.dense.d_state - 1e-9]
    choices = [(widths, states), (widths, [uniform.d_state]), ([uniform.d_inner], states)]
    yield from (choice for i, choice in enumerate(choices) if choice not in choices[:i] and max(map(len, choice)) > 1)


def _within(
    search: Search, losses: LayerLosses, limits: Sequence[Limit], widths: Sequence[int], states: Sequence[int]
) -> Layerwise | None:
    """The allocation that meets the limits, its time clocked where the search clocks."""
    clocks = search.target.latency_table is None
    for _ in range(ROUNDS):
        found = allocate(search.dense, widths, states, losses.of_block, _of_blocks(search, limits))
        if found is None or not clocks or all(limit.name != "time" for limit in limits):
            return found
        if found not in search.clocked:
            search.clock([found])
        if all(limit.allows(found) for limit in limits):
            return found
    return None


def _of_blocks(search: Search, limits: Sequence[Limit]) -> list[BlockLimit]:
    """Limits of the whole model as limits of what its blocks cost."""
    found = []
    for limit in limits:
        if limit.name == "parameters":
            most = limit.most * search.parameters - search.parameters_outside
            found.append(BlockLimit(search.parameters_of, most))
        else:
            table = search.table
            most = limit.most / search.correction * table.dense - table.rest
            found.append(BlockLimit(table.block_seconds, most))
    return found
