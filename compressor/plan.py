"""The plan of a run: what `CompressConfig` means for a model of these sizes, worked out once."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ssmc.compressor.methods.method import KeepCounts, Plan
from ssmc.compressor.methods.registry import methods
from ssmc.compressor.options.config import CompressConfig

if TYPE_CHECKING:
    from ssmc.runtime.models.families import Architecture, Dimensions


def make_plan(config: CompressConfig, architecture: Architecture, sizes: Dimensions, model_config: Any = None) -> Plan:
    """The plan of a run.

    Args:
        config: what was asked for.
        architecture: adapter of the model's family.
        sizes: of the dense model.
        model_config: transformers' configuration of it, where there is one.

    Raises:
        UsageError: the counts asked for do not fit the model, remove nothing, or leave nothing; or a score cannot
            decide about this model.
    """
    plan = plan_without_counts(config, architecture, sizes, model_config)
    counts = {name: numbers for step in plan.steps for name, numbers in step.keep(plan).items()}
    return replace(plan, keep=replace(plan.keep, **counts))


def plan_without_counts(
    config: CompressConfig, architecture: Architecture, sizes: Dimensions, model_config: Any = None
) -> Plan:
    """A plan that keeps everything: enough to see whether a search for the numbers makes sense. As `make_plan`."""
    everything = KeepCounts((sizes.d_state,) * sizes.n_layer, (sizes.d_inner,) * sizes.n_layer)
    plan = Plan(config, architecture, sizes, everything, model_config=model_config)
    steps = tuple(method for method in methods() if method.asked_for(plan))
    for step in steps:
        step.check(plan)
    return replace(plan, steps=steps, needs_text=any(step.needs_text(plan) for step in steps))
