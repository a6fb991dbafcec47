"""The last part of a search that may give each layer sizes of its own: measure who matters, share out, try, compare."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ssmc.compressor.options.patterns import CHANNEL, COLUMN
from ssmc.compressor.pipeline import Run, each_alone
from ssmc.compressor.plan import make_plan
from ssmc.compressor.search.allocation import ROUNDS, Limit, LossModel, Sizes, cheapest_within
from ssmc.compressor.search.configured import configured
from ssmc.compressor.search.layer_sizes import BlockLimit, LayerLosses, Layerwise, allocate, shared_out
from ssmc.compressor.search.trials import Trials
from ssmc.runtime.measure.losses import divergence, last_hidden
from ssmc.runtime.models.fast import use_fast_scan

PROBES = 4  # samples a layer alone is pruned on, and as many that its divergence is measured on
FASTER = (0.8, 0.85, 0.9, 0.95, 1.0)
"""Times the uniform model's time that are tried when the fastest within a bound of the perplexity is asked for."""


def uneven_sizes(
    trials: Trials, uniform: Sizes, limits: Sequence[Limit], model: LossModel
) -> tuple[Sizes | Layerwise, LayerLosses]:
    """Better sizes than the uniform ones that were found, or those.

    Args:
        trials: with the uniform part of it done.
        uniform: what that found.
        limits: of parameters and time; none where only the perplexity is bounded.
        model: its losses.

    Returns:
        The sizes, and what the layers' losses are taken to be.
    """
    losses = layer_losses(trials, uniform, model)
    candidates: list[Sizes | Layerwise]
    if limits:
        found = [_within(trials, losses, limits, *sizes) for sizes in _choices(trials, uniform, model)]
        candidates = [uniform, *_new(found, uniform)]
        return min(candidates, key=trials.judge), losses
    time, sizes = trials.share_of_time(uniform), next(_choices(trials, uniform, model))
    faster = [_within(trials, losses, [Limit("time", trials.share_of_time, part * time)], *sizes) for part in FASTER]
    candidates = [*_new(faster, uniform), uniform]
    best = cheapest_within(candidates, trials.judge, trials.goal.most_nats, len(candidates) // 2)
    return best or uniform, losses


def _new(found: Sequence[Layerwise | None], uniform: Sizes) -> list[Layerwise]:
    """What was found, each once, and not the uniform model again."""
    return [sizes for sizes in dict.fromkeys(found) if sizes is not None and sizes.blocks() != uniform.blocks()]


def layer_losses(trials: Trials, uniform: Sizes, model: LossModel) -> LayerLosses:
    """What each layer costs when it alone is pruned: how far the predictions move, on a few samples."""
    shares = uniform.removed(trials.dense)
    weights = {}
    for part in (COLUMN, CHANNEL):
        if part in trials.config.parts:
            share = min(model.curves[part].shares, key=lambda s: abs(s - shares.get(part, s)))
            weights[part] = shared_out([*_divergences(trials, part, share)])
    return LayerLosses(trials.dense, {part: model.curves[part] for part in weights}, weights)


def _divergences(trials: Trials, part: str, share: float) -> Iterator[float]:
    checkpoint, samples = trials.checkpoint, trials.samples
    config = configured(trials.config, {part: share}, trial=True)
    held = samples.held_out[:PROBES]
    dense = last_hidden(checkpoint.model, held)
    fit = samples.fit[:PROBES].to(checkpoint.model.device)
    plan = make_plan(config, checkpoint.architecture, trials.dense, checkpoint.config)
    for _ in each_alone(Run(checkpoint.model, plan, fit, checkpoint.dtypes, progress=trials.progress)):
        yield divergence(dense, use_fast_scan(checkpoint.model), held)


def _choices(trials: Trials, uniform: Sizes, model: LossModel) -> Iterator[tuple[list[int], list[int]]]:
    """What layers may choose between, (widths, numbers of states), as far down as the curves were measured: both, and
    one of the two as in the uniform model."""
    widths, states = trials.allowed()
    least = {part: 1 - curve.shares[-1] for part, curve in model.curves.items()}
    widths = [w for w in widths if w >= least.get(CHANNEL, 1) * trials.dense.d_inner - 1e-9]
    states = [n for n in states if n >= least.get(COLUMN, 1) * trials.dense.d_state - 1e-9]
    choices = [(widths, states), (widths, [uniform.d_state]), ([uniform.d_inner], states)]
    yield from (choice for i, choice in enumerate(choices) if choice not in choices[:i] and max(map(len, choice)) > 1)


def _within(
    trials: Trials, losses: LayerLosses, limits: Sequence[Limit], widths: Sequence[int], states: Sequence[int]
) -> Layerwise | None:
    """The allocation that meets the limits, its time clocked where the search clocks."""
    clocks = trials.goal.latency_table is None
    for _ in range(ROUNDS):
        found = allocate(trials.dense, widths, states, losses.of_block, _of_blocks(trials, limits))
        if found is None or not clocks or all(limit.name != "time" for limit in limits):
            return found
        if found not in trials.clocked:
            trials.clock([found])
        if all(limit.allows(found) for limit in limits):
            return found
    return None


def _of_blocks(trials: Trials, limits: Sequence[Limit]) -> list[BlockLimit]:
    """Limits of the whole model as limits of what its blocks cost."""
    found = []
    for limit in limits:
        if limit.name == "parameters":
            most = limit.most * trials.parameters - trials.parameters_outside
            found.append(BlockLimit(trials.parameters_of, most))
        elif limit.name == "memory":
            found.append(_memory_limit(trials, limit.most))
        else:
            table = trials.table
            most = limit.most / trials.correction * table.dense - table.rest
            found.append(BlockLimit(table.block_seconds, most))
    return found


def _memory_limit(trials: Trials, most: float) -> BlockLimit:
    """The memory of blocks and of their sequences' states; what stands outside the blocks takes its part first."""
    each = trials.outline.weight_bytes / trials.parameters  # bytes of a parameter

    def cost(d_inner: int, d_state: int) -> float:
        sequence = trials.sequence_bytes(1, d_inner, d_state)
        return each * trials.parameters_of(d_inner, d_state) + trials.goal.batch * sequence

    whole = trials.memory(Sizes.of(trials.dense))
    return BlockLimit(cost, most * whole - each * trials.parameters_outside)
