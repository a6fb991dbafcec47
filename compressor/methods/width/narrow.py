"""The residual stream of the whole model, turned and cut, before anything else is pruned inside its layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch

from ssmc.compressor.methods.method import Record, Survey
from ssmc.compressor.methods.registry import score
from ssmc.compressor.methods.ridge import ridged, solve
from ssmc.compressor.methods.width.counts import width_to_keep
from ssmc.compressor.methods.width.fit import best_reads, best_writes
from ssmc.compressor.methods.width.moments import stream_moments
from ssmc.compressor.methods.width.score import StreamMoments, WidthScore
from ssmc.compressor.options.patterns import WIDTH
from ssmc.runtime.models.architectures.residual import Basis, change_basis, sites

RIDGE = 0.1  # of the mean Fisher information of the stream; 0.01 and 1 do as well


@dataclass(frozen=True)
class WidthRecord(Record):
    """How narrow the residual stream became.

    Attributes:
        kept: coordinates that stay.
        d_model: how many there were.
        left_out: the part of what the norms put out that lies outside of what stays; None where no text was looked at.
    """

    name = "width"

    kept: int
    d_model: int
    left_out: float | None

    def as_manifest(self) -> dict[str, Any]:
        """The entry of the manifest of the whole model."""
        return {"kept": self.kept, "d_model": self.d_model, "left_out": self.left_out}


@torch.no_grad()
def narrow_stream(survey: Survey) -> WidthRecord:
    """Choose what stays of the stream and write the model in its basis, in place and without changing a shape.

    With repair, what a map adds to the stream outside of what stays is added inside where it does the same, as far as
    the predictions go: of all vectors of the subspace the one whose difference costs least by the Fisher information
    of the stream at this place. From there these maps are fitted together (`best_writes`), unless the head is the
    embedding, and what reads the stream reads the best linear estimate of what it read before.
    """
    architecture, model, config = survey.plan.architecture, survey.model, survey.plan.config
    judge = cast(WidthScore, score(WIDTH, config.score_of(WIDTH)))
    moments = stream_moments(survey, judge.needs_text or config.repair, judge.needs_cost or config.repair)
    keep = width_to_keep(survey.plan)
    read = judge.basis(moments, keep).cpu()
    parts: Any = model
    last, tied = None, parts.get_output_embeddings().weight is parts.get_input_embeddings().weight
    if tied:
        read, last = _of_tied_head(read, model.get_submodule(architecture.last_norm).weight.detach())
    count = len(sites(architecture, model))
    reads, write = (read,) * count, [read.t()] * count
    if config.repair:
        write = [_write(read, cost) for cost in cast(torch.Tensor, moments.stream).cpu()]
        if tied:  # the rows of the embedding are those of the head; without them nothing worth the time is gained
            write[0] = read.t()
        else:
            write = best_writes(survey, read, write, cast(torch.Tensor, moments.cost).cpu())
        reads = best_reads(survey, write)
    change_basis(architecture, model, Basis(reads, tuple(write), last))
    for name, parameter in model.named_parameters():
        if name in survey.stored_dtypes:
            parameter.copy_(parameter.to(survey.stored_dtypes[name]))
    return WidthRecord(keep, len(read), _left_out(moments, read))


def _of_tied_head(read: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Another basis of the same subspace, in which the last norm has a weight, and this weight (K,).

    A head that is the embedding cannot take the weights g of the norm before it. But inside the subspace the quadratic
    form of diag(g) has principal axes, along which it is a weight again.
    """
    last, axes = torch.linalg.eigh(read.t() @ (weight.double()[:, None] * read))
    return read @ axes, last


def _write(read: torch.Tensor, cost: torch.Tensor) -> torch.Tensor:
    """(K, D) that takes what is added to the stream to where it costs least: (Q' F Q)^-1 Q' F, F with a ridge."""
    metric = ridged(cost, RIDGE)
    return solve(read.t() @ metric @ read, read.t() @ metric)


def _left_out(moments: StreamMoments, read: torch.Tensor) -> float | None:
    total = moments.read.sum(0).cpu()
    whole = float(total.trace())
    return 1 - float((read.t() @ total @ read).trace()) / whole if whole > 0 else None
