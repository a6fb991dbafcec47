"""The methods of this folder, as the rest of ssmc sees them."""

from __future__ import annotations

import ssmc.compressor.methods.experts.scores  # noqa: F401
from ssmc.compressor.methods.method import Job, Outcome, Survey, Table
from ssmc.compressor.methods.registry import register_method
from ssmc.compressor.methods.units.method import Units
from ssmc.compressor.options.patterns import EXPERT, EXPERT_WIDTH, Pattern


class RemoveExperts(Units):
    """Whole experts: those that what the layer adds can do without best.

    They are cut out at once, as a router cannot be kept from a silent one; so the model is written as a whole.
    """

    name = "expert"
    place = 11
    leaves = ("experts",)
    whole_model = True
    pattern = Pattern(EXPERT, "experts", "`expert` (experts of a hybrid)", "exact", combines=6, refines=False)

    def prune(self, job: Job) -> None:
        """Every layer that has some."""
        from ssmc.compressor.methods.experts.prune import prune_experts

        prune_experts(job)

    def finish_outside(self, survey: Survey) -> None:
        """The configuration says how many there are, and layers that go as a whole have as many."""
        from ssmc.compressor.methods.experts.outside import tell_experts

        tell_experts(survey)


class ExpertWidth(Units):
    """Neurons of every expert, as many of each."""

    name = "expert-width"
    place = 15
    leaves = ("experts", "units")
    pattern = Pattern(
        EXPERT_WIDTH, "neurons of experts", "`expert-width` (neurons of every expert)", "obs", combines=7, refines=False
    )

    def prune(self, job: Job) -> None:
        """Every layer that has some; in Jamba MLPs beside the experts as well."""
        from ssmc.compressor.methods.experts.prune import prune_neurons
        from ssmc.compressor.methods.units.prune import prune_units

        prune_neurons(job)
        if EXPERT_WIDTH not in job.units_kept:
            prune_units(job, EXPERT_WIDTH)

    def tables(self, outcome: Outcome) -> list[Table]:
        """How many stay in each layer, of all its experts together."""
        rows = [
            (str(index), str(len(layer.units_kept[EXPERT_WIDTH])))
            for index, layer in enumerate(outcome.layers)
            if EXPERT_WIDTH in layer.units_kept
        ]
        return [Table("Neurons of experts", ("layer", "kept, all experts"), tuple(rows))] if rows else []


register_method(RemoveExperts())
register_method(ExpertWidth())
