"""How many units stay: a sparsity becomes a number that stock loaders take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ssmc.compressor.methods.counts import nearest
from ssmc.compressor.methods.method import Plan
from ssmc.compressor.options.patterns import pattern_of
from ssmc.runtime.errors import UsageError

if TYPE_CHECKING:
    from ssmc.runtime.models.architectures.units import Part


def units_to_keep(part: Part, config: Any, sparsity: float) -> int:
    """How many units of a part stay: the number nearest to what the sparsity leaves, of those a stock loader takes.

    Args:
        part: of the family.
        config: transformers' configuration of the dense model.
        sparsity: the part that is removed, inside (0, 1).
    """
    total = part.total(config)
    return nearest([*part.allowed(config), total], total * (1 - sparsity))


def check_units(plan: Plan, kind: str) -> None:
    """Refuse a run that would remove no unit of a kind it names, before any work.

    Args:
        plan: of the run.
        kind: of units.

    Raises:
        UsageError: with the nearest that works.
    """
    config, removes = plan.model_config, pattern_of(kind).removes
    parts = [part for part in plan.architecture.units if part.kind == kind and part.total(config)]
    sparsity = plan.config.sparsity_of(kind)
    for part in parts:
        if reason := part.refusal(config):
            raise UsageError(f"No {removes} can be removed from this model: {reason}. Leave {kind} out of --pattern.")
    if any(units_to_keep(part, config, sparsity) < part.total(config) for part in parts):
        return
    able = sorted({(part.total(config) - n, part.total(config)) for part in parts for n in part.allowed(config)})
    if not able:
        raise UsageError(f"This model has no {removes} that can go. Leave {kind} out of --pattern.")
    least, total = able[0]
    raise UsageError(
        f"sparsity {sparsity:g} of {total} {removes} removes none; the least that can go is {least}, a sparsity of "
        f"{least / total:.3g}."
    )
