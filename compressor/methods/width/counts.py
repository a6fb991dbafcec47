"""How narrow the residual stream becomes: a sparsity becomes a number that hardware and stock loaders take.

Where a loader has no d_inner of its own but an `expand`, d_inner must stay a whole multiple of d_model, or twice that:
then d_model and d_inner are chosen together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from ssmc.compressor.methods.counts import MULTIPLES, default_multiple, nearest
from ssmc.compressor.methods.method import Plan
from ssmc.compressor.options.patterns import CHANNEL, EXPERT, HEAD, HEAD_DIM, WIDTH
from ssmc.runtime.errors import UsageError
from ssmc.runtime.models import families
from ssmc.runtime.models.architectures.dimensions import Mamba2Dimensions
from ssmc.runtime.models.architectures.experts import whole_strides
from ssmc.runtime.models.consumers import TWICE, consumer_named

if TYPE_CHECKING:
    from ssmc.runtime.models.families import Architecture, Dimensions

TOLERANCE = 0.05  # of d_model: more or less than was asked for is refused where loaders leave few numbers


@dataclass(frozen=True, order=True)
class Shape:
    """d_model and d_inner of a narrower model; d_inner is channels, or heads of so many channels."""

    d_model: int
    heads: int
    head_dim: int

    @property
    def d_inner(self) -> int:
        """Channels of a mixer."""
        return self.heads * self.head_dim


def width_to_keep(plan: Plan) -> int:
    """How many coordinates of the residual stream stay.

    Raises:
        UsageError: none would go, or none can.
    """
    bound = shape_to_keep(plan)
    if bound is not None:
        return bound.d_model
    d_model, sparsity = plan.sizes.d_model, plan.config.sparsity_of(WIDTH)
    multiple = plan.config.round_channels or default_multiple(d_model)
    able = able_d_models(plan.architecture, plan.sizes, plan.config.round_channels, plan.model_config)
    kept = nearest([*able, d_model], d_model * (1 - sparsity))
    if kept == d_model:
        smaller = ", ".join(str(m) for m in MULTIPLES if m < multiple)
        raise UsageError(
            f"sparsity {sparsity:g} of a d_model of {d_model}, rounded to a multiple of {multiple}, removes nothing; "
            f"the least that can go is {multiple}, a sparsity of {multiple / d_model:.3g}"
            f"{f', or use a smaller round_channels ({smaller})' if smaller else ''}."
        )
    return kept


def able_d_models(
    architecture: Architecture, sizes: Dimensions, multiple: int | None = None, config: Any = None
) -> list[int]:
    """The sizes below its own that d_model may be cut to while d_inner stays, rising.

    Args:
        architecture: of the model.
        sizes: of the model.
        multiple: what a free d_model must be a multiple of; None: a number that hardware likes.
        config: transformers' configuration, where there may be experts.
    """
    run = _run_by_experts(architecture, sizes, config)
    if not has_own_d_inner(architecture):
        return [count for count in run if sizes.d_inner % count == 0]
    multiple = multiple or default_multiple(sizes.d_model)
    return [count for count in run if count % multiple == 0]


def _run_by_experts(architecture: Architecture, sizes: Dimensions, config: Any) -> Sequence[int]:
    """What a smaller d_model may be for the experts that read it, if there are any."""
    routed = any(part.kind == EXPERT and part.total(config) for part in architecture.units)
    return whole_strides(sizes.d_model) if routed else range(1, sizes.d_model)


def shape_to_keep(plan: Plan) -> Shape | None:
    """d_model and d_inner together, the shape nearest to what the sparsities leave; None where each is free.

    Raises:
        UsageError: nothing that loaders take is near.
    """
    twice = wants_twice(plan.sizes, plan.config.runtime)
    if WIDTH not in plan.config.parts or (not twice and has_own_d_inner(plan.architecture)):
        return None
    dense, shapes = _dense(plan), [*_shapes(plan, twice)]
    found = min(shapes, key=lambda shape: (_distance(plan, shape), shape)) if shapes else dense
    parts = plan.config.parts
    stays = [found.d_model == dense.d_model, HEAD in parts and found.heads == dense.heads]
    stays += [CHANNEL in parts and found.heads == dense.heads, HEAD_DIM in parts and found.head_dim == dense.head_dim]
    far = abs(found.d_model / dense.d_model - 1 + plan.config.sparsity_of(WIDTH)) > TOLERANCE
    if far or any(stays):
        raise UsageError(_refusal(plan, twice, [s for s in shapes if s.d_model < dense.d_model]))
    return found


def _dense(plan: Plan) -> Shape:
    sizes = plan.sizes
    if sizes.heads is None:
        return Shape(sizes.d_model, sizes.d_inner, 1)
    return Shape(sizes.d_model, sizes.heads, cast(Mamba2Dimensions, sizes).head_dim)


def has_own_d_inner(architecture: Architecture) -> bool:
    """Whether loaders of a family have a d_inner of its own, so that d_model is free."""
    able = architecture.capabilities
    return able.free_width or not (able.heads or able.whole_expand or families.CHANNEL in able.fixed)


def wants_twice(sizes: Dimensions, runtime: str | None) -> bool:
    """Whether d_inner must be twice d_model for the runtime that the result is for."""
    return runtime is not None and consumer_named(runtime).rule(sizes).width == TWICE


def _shapes(plan: Plan, twice: bool) -> Iterator[Shape]:
    """All that loaders take and the pattern can lead to, the dense one among them."""
    dense, parts, groups = _dense(plan), plan.config.parts, plan.sizes.groups
    multiple = plan.config.round_channels or default_multiple(plan.sizes.d_inner)
    step = groups if plan.has_heads else multiple
    heads = [*range(step, dense.heads, step), dense.heads] if HEAD in parts or CHANNEL in parts else [dense.heads]
    dims = range(1, dense.head_dim + 1) if HEAD_DIM in parts else [dense.head_dim]
    run = [*_run_by_experts(plan.architecture, plan.sizes, plan.model_config), dense.d_model]
    for count in heads:
        for dim in dims:
            d_inner = count * dim
            for d_model in [d_inner // 2] if twice else run:
                if d_inner % d_model == 0 and d_model in run:
                    yield Shape(d_model, count, dim)


def _distance(plan: Plan, shape: Shape) -> float:
    """How far a shape is from what was asked for: the sum of the squared differences of what stays."""
    dense, config = _dense(plan), plan.config
    part = HEAD if HEAD in config.parts else CHANNEL
    pairs = [(WIDTH, shape.d_model / dense.d_model), (part, shape.heads / dense.heads)]
    pairs.append((HEAD_DIM, shape.head_dim / dense.head_dim))
    return sum((left - (1 - config.sparsity_of(name))) ** 2 for name, left in pairs if name in config.parts)


def _refusal(plan: Plan, twice: bool, able: list[Shape]) -> str:
    dense, parts = _dense(plan), "+".join(plan.config.parts)
    who = plan.config.runtime or "transformers"
    why = f"{who} wants a d_inner that is {'twice' if twice else 'a whole multiple of'} d_model"
    other = HEAD if plan.has_heads else CHANNEL
    advice = f"Remove {other}s by the same part, --pattern {other}+{WIDTH}."
    if plan.architecture.capabilities.whole_expand:
        advice = "Leave width out of --pattern."
    if able:
        near = min(able, key=lambda shape: (_distance(plan, shape), shape))
        one = f"d_model {near.d_model} (width={1 - near.d_model / dense.d_model:.3g}"
        one += f", {other}={1 - near.heads / dense.heads:.3g})" if near.heads < dense.heads else ")"
        advice = f"The nearest that works is {one}." + ("" if near.heads < dense.heads else f" {advice}")
    return f"A d_model of {dense.d_model} cannot be cut so with --pattern {parts}: {why}. {advice}"
