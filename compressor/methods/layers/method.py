"""Whole layers, and the SSM of whole layers, as the rest of ssmc sees them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, cast

from ssmc.compressor.methods.layers import scores as scores  # registers them
from ssmc.compressor.methods.layers.score import LayerScore, Removal
from ssmc.compressor.methods.method import BlockMethod, Outcome, Plan, Survey, Table
from ssmc.compressor.methods.registry import register_method, score
from ssmc.compressor.options.patterns import LAYER, SSM_MODULE, Pattern, looks_at_text
from ssmc.runtime.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from ssmc.runtime.models.families import Architecture


_WHY = "one with a mixer stays, and one with attention where there is any"


def removal_count(n_layer: int, sparsity: float) -> int:
    """How many of `n_layer` layers go: the nearest whole number, at least one, and at least one stays."""
    return min(max(1, round(n_layer * sparsity)), n_layer - 1)


def _least(plan: Plan) -> int:
    """How many layers stay at least: of a hybrid one with a mixer and one with attention, which may be the same."""
    if plan.architecture.capabilities.uniform:
        return 1
    architecture = cast(Any, plan.architecture)
    mixers, attention = (
        {*layers(plan.model_config)} for layers in (architecture.layers_with_mixers, architecture.layers_with_attention)
    )
    return 1 if mixers & attention or not attention else 2


class _Removing(BlockMethod):
    """What both have in common."""

    pattern: ClassVar[Pattern]
    place = 0

    def keep(self, plan: Plan) -> dict[str, tuple[int, ...]]:
        """Nothing of the layers that stay.

        Raises:
            UsageError: more layers would go than can, with the most that can.
        """
        layers, sparsity = plan.sizes.n_layer, plan.config.sparsity_of(self.pattern.name)
        most = layers - _least(plan)
        if most < 1:
            raise UsageError(
                f"None of the {layers} layers of this model can go: {_WHY}. Leave {self.pattern.name} out of --pattern."
            )
        if removal_count(layers, sparsity) > most:
            raise UsageError(
                f"sparsity {sparsity:g} of {layers} layers would remove {removal_count(layers, sparsity)}; the most "
                f"that can go is {most}, a sparsity of {most / layers:.3g}: {_WHY}."
            )
        return {}

    def needs_text(self, plan: Plan) -> bool:
        """As the score says."""
        return looks_at_text(self.pattern.name, plan.config.score_of(self.pattern.name))

    def choose(self, survey: Survey) -> list[Removal]:
        """As the score decides."""
        part, config = self.pattern.name, survey.plan.config
        count = removal_count(len(survey.plan.architecture.blocks(survey.model)), config.sparsity_of(part))
        if len(survey.removals) >= count:
            return list(survey.removals[:count])
        judge = cast(LayerScore, score(part, config.score_of(part)))
        return judge.choose(survey, count, partial(self.remove, survey.plan.architecture))

    def tables(self, outcome: Outcome) -> list[Table]:
        """What went, in its order."""
        if not outcome.removed:
            return []
        judged = outcome.removed[0].influence is not None
        heading = "influence (1 - cosine of input and output)" if judged else "loss on the calibration text (nats)"
        rows = []
        for step, removal in enumerate(outcome.removed, 1):
            value = removal.influence if judged else removal.loss
            rows.append((str(step), str(removal.layer), "" if value is None else f"{value:.4f}"))
        return [Table(f"Removed {self.pattern.removes}, in this order", ("step", "layer", heading), tuple(rows))]


class Layers(_Removing):
    """Whole blocks."""

    name = "layers"
    pattern = Pattern(LAYER, "layers", "`layer` (whole blocks)", "mamba-shedder", combines=1, whole_blocks=True)

    def remove(self, architecture: Architecture, block: nn.Module) -> None:
        """A block that hands on what it reads."""
        architecture.remove_block(block)


class SsmModules(_Removing):
    """The SSM of whole blocks: their states are silent, the convolution and the gate stay."""

    name = "ssm-modules"
    pattern = Pattern(SSM_MODULE, "SSMs", "`ssm-module` (the SSM of whole blocks)", "mamba-shedder", whole_blocks=True)

    def remove(self, architecture: Architecture, block: nn.Module) -> None:
        """A block without states."""
        architecture.remove_ssm(block)

    def notes(self, outcome: Outcome) -> list[str]:
        """That nothing gets faster."""
        return [
            "The SSM of the removed layers is silent but still computed: stock loaders have no layer without one, so "
            "this makes nothing smaller or faster. It is there to compare with."
        ]


register_method(Layers())
register_method(SsmModules())
