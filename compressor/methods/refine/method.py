"""Refinement as the rest of ssmc sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssmc.compressor.methods.method import Job, Method, Outcome, Plan, Table
from ssmc.compressor.methods.registry import register_method
from ssmc.compressor.methods.tables import error_text

if TYPE_CHECKING:
    import torch


class Refine(Method):
    """Gradient steps on each pruned layer, without labels, towards the dense model's output there."""

    name = "refine"
    leaves = ("refined",)
    place = 50
    follows_dense = True

    def asked_for(self, plan: Plan) -> bool:
        """By the option of its name."""
        return plan.config.refine > 0

    def shares_samples(self, plan: Plan) -> bool:
        """Gradients add up."""
        return True

    def check_text(self, tokens: torch.Tensor) -> None:
        """Some samples must be left to judge by."""
        from ssmc.compressor.methods.refine.steps import check_samples

        check_samples(tokens)

    def prune(self, job: Job) -> None:
        """Every layer with a mixer."""
        from ssmc.compressor.methods.refine.steps import refine_layer

        refine_layer(job)

    def tables(self, outcome: Outcome) -> list[Table]:
        """Errors on held-out samples, before and after."""
        rows = tuple(
            (str(index), error_text(r.error), error_text(r.error_before), str(r.best_step), str(r.steps))
            for index, layer in enumerate(outcome.layers)
            if (r := layer.refined) is not None
        )
        legend = (
            "error on held-out samples: squared difference of what the layer adds to the dense model's residual "
            "stream, relative to it. Best step 0: the layer was left as it was."
        )
        return [Table("Refinement", ("layer", "error", "before", "best step", "steps"), rows, legend)] if rows else []


register_method(Refine())
