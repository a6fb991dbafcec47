"""Find the sizes that meet a goal with the least loss: curves of loss, a shortlist, trials of those, the best.

What each part of a pattern costs is measured alone at a few sparsities; the likeliest combinations are tried for real.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ssmc.compressor.options.config import CompressConfig
from ssmc.compressor.options.patterns import CHANNEL, COLUMN, HEAD, HEAD_DIM, LAYER, WIDTH
from ssmc.compressor.search.allocation import (
    ROUNDS,
    SMALLEST,
    Curve,
    Limit,
    LossModel,
    Sizes,
    cheapest_within,
    frontier,
    shortlist,
)
from ssmc.compressor.search.counting import require_one
from ssmc.compressor.search.layer_sizes import LayerLosses, Layerwise
from ssmc.compressor.search.per_layer import uneven_sizes
from ssmc.compressor.search.trials import Trials
from ssmc.runtime.errors import UsageError, VerificationError

TRIED = 3  # combinations that are tried for real
SWEEP = {
    COLUMN: (0.5, 0.875),
    CHANNEL: (0.25, 0.5),
    WIDTH: (0.125, 0.25),
}  # where the parts' curves are measured, roughly
LAYERS = 2  # and up to how many layers


@dataclass(frozen=True)
class Found:
    """What a search decided."""

    sizes: Sizes | Layerwise
    config: CompressConfig  # the ordinary run that leaves them
    expected: dict[str, float]
    record: dict[str, Any]  # for the manifest: everything it was decided on


def find_sizes(trials: Trials) -> Found:
    """Find the sizes that meet the goal with the least loss.

    Args:
        trials: models tried so far, none at first; those that this tries are added.

    Raises:
        UsageError: nothing meets it, by the latency table and by counting.
        VerificationError: what meets it loses more than the bound.
    """
    goal = trials.goal
    candidates, limits = trials.candidates(), _limits(trials)
    require_one(trials.config, candidates, limits, trials.able)
    curves = {part: _curve(trials, part, candidates) for part in trials.config.parts}
    model = LossModel(trials.dense, curves)
    uniform = _least_loss(trials, candidates, limits, model) if limits else _fastest(trials, candidates, model)
    best: Sizes | Layerwise = uniform
    losses = None
    if goal.per_layer:
        best, losses = uneven_sizes(trials, uniform, limits, model)
    return _found(trials, best, model, losses)


def _limits(trials: Trials) -> list[Limit]:
    limits = trials.counted_limits()
    if trials.goal.target_latency is not None:
        limits.append(Limit("time", trials.share_of_time, trials.goal.target_latency))
    return limits


def _curve(trials: Trials, part: str, candidates: Sequence[Sizes]) -> Curve:
    """The loss of removing one part alone, measured at two or three shares.

    Where channels or heads go by one ratio with width, that of both stands for width, and they have cost nothing more.
    """
    others = {CHANNEL, HEAD, HEAD_DIM} if trials.coupled else set()
    if part in others:
        return Curve((0.5,), (SMALLEST,))
    dense, full = trials.dense, Sizes.of(trials.dense)
    if part == LAYER:
        most = min(LAYERS, dense.n_layer // 2)
        points = [
            Sizes(dense.n_layer - gone, full.d_inner, full.d_state) for gone in range(most, 0, -1)
        ]  # the fewer are then known
    else:
        shares = {sizes: sizes.removed(dense) for sizes in candidates}
        alone = {sizes: gone[part] for sizes, gone in shares.items() if gone.keys() - others == {part}}
        points = [min(alone, key=lambda s: (abs(alone[s] - share), s)) for share in SWEEP[part] if alone]
    if not points:
        return Curve((0.5,), (math.inf,))
    return Curve.through({sizes.removed(dense)[part]: trials.try_out(sizes) for sizes in dict.fromkeys(points)})


def _least_loss(trials: Trials, candidates: Sequence[Sizes], limits: Sequence[Limit], model: LossModel) -> Sizes:
    goal, chosen = trials.goal, shortlist(candidates, limits, model, TRIED, trials.teaches)
    if goal.target_latency is not None and goal.latency_table is None:
        chosen = _set_right(trials, candidates, limits, model)
    best = min(chosen, key=lambda sizes: (trials.judge(sizes), sizes))
    if not trials.teaches and trials.judge(best) > goal.most_nats:  # else all of the steps decide
        raise VerificationError(
            f"What meets the goal with the least loss found raises the perplexity by "
            f"{math.expm1(trials.judge(best)):.1%} on held-out calibration text, more than the "
            f"{goal.max_ppl_increase:.1%} allowed, so nothing was written. Ask for less, or allow more."
        )
    return best


def _set_right(trials: Trials, candidates: Sequence[Sizes], limits: Sequence[Limit], model: LossModel) -> list[Sizes]:
    """Time what is chosen before anything is pruned, correct the table by what shows, and choose once more."""
    chosen = shortlist(candidates, limits, model, TRIED, trials.teaches)
    for _ in range(ROUNDS):
        new = [sizes for sizes in chosen if sizes not in trials.clocked]
        if not new:
            break
        trials.clock(new)
        chosen = shortlist(candidates, limits, model, TRIED, trials.teaches)
        if not chosen:
            raise UsageError(
                f"The pattern {trials.config.pattern} cannot reach {trials.goal.target_latency:.4g} of the dense "
                f"model's time here: models took {trials.correction:.2f} times what the latency table says. Ask for "
                "less."
            )
    return chosen


def _fastest(trials: Trials, candidates: Sequence[Sizes], model: LossModel) -> Sizes:
    """The fastest within the bound of the loss, by bisection along what nothing beats in both."""
    ordered = frontier(candidates, trials.share_of_time, model)
    bound = trials.goal.most_nats
    start = next((i for i, sizes in enumerate(ordered) if model(sizes) <= bound), len(ordered) - 1)
    best = cheapest_within(ordered, trials.judge, bound, start)
    if best is None:
        least = min((trials.taught or trials.losses).values())
        raise VerificationError(
            f"Nothing that was tried keeps the perplexity within {trials.goal.max_ppl_increase:.2%} of the dense "
            f"model's on held-out calibration text (the least was {math.expm1(least):.2%}), so nothing was "
            "written. Allow more."
        )
    return best


def _found(trials: Trials, sizes: Sizes | Layerwise, model: LossModel, losses: LayerLosses | None) -> Found:
    expected = {
        "parameters": trials.share_of_parameters(sizes),
        "memory": trials.memory(sizes),
        "excess_nats": trials.judge(sizes),
    }
    if trials.goal.needs_time:
        expected["time"] = trials.share_of_time(sizes)

    def added_up(tried: Sizes | Layerwise) -> float:
        if isinstance(tried, Sizes):
            return model(tried)
        if losses is None:
            raise ValueError("sizes of each layer are tried only where the layers' losses are known")
        return losses(tried)

    record: dict[str, Any] = {
        "asked": trials.goal.model_dump(mode="json", exclude={"latency_table"}),
        "sizes": _record(sizes),
        "expected": expected,
        "curves": {part: asdict(curve) for part, curve in model.curves.items()},
        "trials": [
            {**_record(tried), "added_up_nats": added_up(tried), "excess_nats": loss}
            for tried, loss in trials.losses.items()
        ],
        **_taught(trials),
        "clocked": [{**_record(tried), "time": asdict(ratio)} for tried, ratio in trials.clocked.items()],
        "correction": trials.correction,
        "held_out_seen": trials.samples.seen,
        "latency_table": trials.table.to_json() if trials.goal.needs_time else None,
    }
    if losses is not None:
        record["layer_weights"] = losses.weights
    return Found(sizes, trials.configured(sizes), expected, record)


def _record(sizes: Sizes | Layerwise) -> dict[str, Any]:
    return sizes.as_record() if isinstance(sizes, Sizes) else asdict(sizes)


def _taught(trials: Trials) -> dict[str, Any]:
    """The trials with a short distillation, where there were any."""
    if not trials.taught:
        return {}
    return {"taught": [{**_record(tried), "excess_nats": loss} for tried, loss in trials.taught.items()]}
