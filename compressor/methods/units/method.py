"""The methods of this folder, as the rest of ssmc sees them: neurons, query heads, and the fit after all removals."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ssmc.compressor.methods.channels.method import FIT_TOKENS_PER_CHANNEL
from ssmc.compressor.methods.method import Job, Method, Outcome, Plan, Table
from ssmc.compressor.methods.registry import register_method
from ssmc.compressor.methods.tables import error_text
from ssmc.compressor.options.patterns import ATTENTION, MLP, Pattern, looks_at_text
from ssmc.runtime.errors import UsageError

if TYPE_CHECKING:
    import torch


class Units(Method):
    """Units of one kind: those that what reads them can do without best."""

    pattern: ClassVar[Pattern]
    in_every_block = True
    leaves: ClassVar[tuple[str, ...]] = ("units",)

    def shares_samples(self, plan: Plan) -> bool:
        """Second moments add up."""
        return True

    def needs_text(self, plan: Plan) -> bool:
        """For the repair, and for most scores."""
        kind = self.pattern.name
        return plan.config.repair or looks_at_text(kind, plan.config.score_of(kind))

    def check(self, plan: Plan) -> None:
        """Something must go, and the configuration must be able to say what stays."""
        from ssmc.compressor.methods.units.counts import check_units

        check_units(plan, self.pattern.name)

    def prune(self, job: Job) -> None:
        """Every layer that has some."""
        from ssmc.compressor.methods.units.prune import prune_units

        prune_units(job, self.pattern.name)

    def tables(self, outcome: Outcome) -> list[Table]:
        """How many stay in each layer."""
        kind, config = self.pattern.name, outcome.plan.model_config
        rows = []
        for index, layer in enumerate(outcome.layers):
            if kind in layer.units_kept:
                rows.append((str(index), str(len(layer.units_kept[kind]))))
        totals = sorted({part.total(config) for part in outcome.plan.architecture.units if part.kind == kind})
        columns = ("layer", f"kept of {' or '.join(map(str, totals))}")
        return [Table(self.pattern.removes.capitalize(), columns, tuple(rows))] if rows else []


class Mlp(Units):
    """Neurons of MLPs, gated or not."""

    name = "mlp"
    place = 14
    pattern = Pattern(MLP, "neurons", "`mlp` (neurons of the MLPs of a hybrid)", "obs", combines=4, refines=False)


class QueryHeads(Units):
    """Query heads of attention: as many of every group of keys and values, or whole groups."""

    name = "attention"
    place = 13
    pattern = Pattern(
        ATTENTION, "query heads", "`attention` (query heads of a hybrid)", "obs", combines=5, refines=False
    )


class Inputs(Method):
    """What reads the residual stream of a hybrid, corrected for what the stream lost before."""

    name = "inputs"
    place = 5
    in_every_block = True
    follows_stream = True

    def asked_for(self, plan: Plan) -> bool:
        """With the fit of the stream, but for blocks that layers share: there the norm reads more than the stream."""
        return plan.config.repair and plan.fits_stream and not plan.architecture.capabilities.shared_blocks

    def shares_samples(self, plan: Plan) -> bool:
        """Second moments add up."""
        return True

    def arrive(self, job: Job, dense: torch.Tensor) -> None:
        """What the first stage reads is compared before the dense stream goes on."""
        from ssmc.compressor.methods.units.inputs import estimate_first

        job.worked_out[self.name] = estimate_first(job, dense)

    def prune(self, job: Job) -> None:
        """The first stage of every layer that stays; the fit of the stream does the others."""
        from ssmc.compressor.methods.units.inputs import correct

        correct(job, 0, job.worked_out[self.name])


class Stream(Method):
    """All that adds to the residual stream of a hybrid, fitted to that of the dense model.

    What was removed is missing from the stream, here and in all that follows: every block makes up for what it can.
    """

    name = "stream"
    leaves = ("stream",)
    place = 30
    in_every_block = True
    follows_stream = True

    def check(self, plan: Plan) -> None:
        """Steps on single mixers would follow another target."""
        if plan.config.refine:
            raise UsageError(
                "refine does not go with what else of a hybrid is removed: its steps move mixers only. Leave it out; "
                "--distill moves the whole model."
            )

    def asked_for(self, plan: Plan) -> bool:
        """With the repair, where a hybrid loses more than states."""
        return plan.config.repair and plan.fits_stream

    def shares_samples(self, plan: Plan) -> bool:
        """Second moments add up."""
        return True

    def prune(self, job: Job) -> None:
        """Every layer that stays."""
        from ssmc.compressor.methods.units.fit import fit_stream

        job.note(fit_stream(job))

    def notes(self, outcome: Outcome) -> list[str]:
        """Whether there was enough text."""
        if outcome.calibration is None:
            return []
        config, plan = outcome.plan.model_config, outcome.plan
        tokens = outcome.calibration.tokens.numel()
        inputs = max([plan.sizes.d_inner, *(p.total(config) * p.channels(config) for p in plan.architecture.units)])
        if tokens >= FIT_TOKENS_PER_CHANNEL * inputs:
            return []
        return [
            f"Linear maps of up to {inputs} inputs were fitted on {tokens} tokens of text, which is few: they may know "
            "that text by heart and lose on any other. Give more with --nsamples or --seqlen, or use --no-repair."
        ]

    def tables(self, outcome: Outcome) -> list[Table]:
        """The errors with and without the fit."""
        rows = tuple(
            (str(index), ", ".join(stage.maps), error_text(stage.error), error_text(stage.error_unrepaired))
            for index, layer in enumerate(outcome.layers)
            if layer.stream is not None
            for stage in layer.stream.stages
        )
        legend = "error: squared difference of what the maps add to the dense model's residual stream, relative to it."
        columns = ("layer", "fitted", "error", "error before the fit")
        return [Table("Fitted to the dense model", columns, rows, legend)] if rows else []


register_method(Mlp())
register_method(QueryHeads())
register_method(Inputs())
register_method(Stream())
