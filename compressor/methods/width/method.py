"""Width, as the rest of ssmc sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ssmc.compressor.methods.method import Method, Outcome, Plan, Record, Survey, Table
from ssmc.compressor.methods.registry import register_method
from ssmc.compressor.methods.width import scores as scores  # registers them
from ssmc.compressor.methods.width.counts import width_to_keep
from ssmc.compressor.options.patterns import CHANNEL, HEAD, WIDTH, Pattern, looks_at_text
from ssmc.runtime.errors import UsageError

if TYPE_CHECKING:
    from ssmc.compressor.methods.width.narrow import WidthRecord


class Width(Method):
    """d_model: the residual stream of the whole model is turned, and what can be done without is cut."""

    name = "width"
    place = 1
    pattern: ClassVar[Pattern] = Pattern(
        WIDTH, "directions of the residual stream", "`width` (d_model, of the whole model)", "fisher", 8, refines=False
    )
    whole_model = True
    inside = False
    leaves = ("width",)

    def needs_text(self, plan: Plan) -> bool:
        """For the repair, and for most scores."""
        return plan.config.repair or looks_at_text(WIDTH, plan.config.score_of(WIDTH))

    def check(self, plan: Plan) -> None:
        """The whole model must be there, and heads are not called channels."""
        if plan.model_config is None:
            raise UsageError(
                "The residual stream of a torch module is not known, its mixers are pruned by themselves. Leave width "
                "out of --pattern."
            )
        if plan.has_heads and CHANNEL in plan.config.parts:
            raise UsageError(f"The channels of this model form heads: with {WIDTH} give --pattern {HEAD}+{WIDTH}.")

    def keep(self, plan: Plan) -> dict[str, tuple[int, ...]]:
        """Of layers nothing goes; of the stream something must."""
        width_to_keep(plan)
        return {}

    def prepare_outside(self, survey: Survey) -> Record | None:
        """Before any layer is pruned inside, which sees the narrower stream."""
        from ssmc.compressor.methods.width.narrow import narrow_stream

        return narrow_stream(survey)

    def notes(self, outcome: Outcome) -> list[str]:
        """What the export has, and what it does with half precision."""
        record = _record(outcome)
        if record is None:
            return []
        return [
            f"d_model becomes {record.kept} of {record.d_model} in the export, whose norms make up for their mean over "
            "fewer coordinates, in float32 even where the model is in half precision."
        ]

    def tables(self, outcome: Outcome) -> list[Table]:
        """How much is left, and how much of what the layers read is not."""
        record = _record(outcome)
        if record is None:
            return []
        out = "" if record.left_out is None else f"{record.left_out:.2%}"
        return [
            Table(
                "Residual stream",
                ("d_model", "kept", "of what norms put out is cut"),
                ((str(record.d_model), str(record.kept), out),),
            )
        ]


def _record(outcome: Outcome) -> WidthRecord | None:
    return next((record for record in outcome.outside if record.name == WIDTH), None)  # type: ignore[return-value]


register_method(Width())
