"""out_proj fitted to the dense model's residual stream, after what happens to the states and channels of a layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from ssmc.compressor.calibration.placement import samples
from ssmc.compressor.methods.method import Job, Record
from ssmc.compressor.methods.ridge import fit
from ssmc.compressor.methods.weights.second_moments import SecondMoment
from ssmc.runtime.collectives import summed


@dataclass(frozen=True)
class OutProjRecord(Record):
    """What fitting out_proj achieved: squared errors of what a layer adds, relative to what it should add."""

    name = "out_proj"

    error: float
    error_unrepaired: float  # with the columns out_proj had before

    def as_manifest(self) -> dict[str, Any]:
        """Both errors."""
        return {"out_proj_error": asdict(self)}


def fit_out_proj(job: Job) -> OutProjRecord:
    """Fit out_proj, in place, so that the layer's output comes closest to the dense model's.

    The target is the dense model's residual stream behind this layer less the pruned model's before it. So the layer
    also makes up for what the layers before it lost, removed ones included.
    """
    return fit_with_moment(job)[0]


def fit_with_moment(job: Job) -> tuple[OutProjRecord, SecondMoment]:
    """As `fit_out_proj`, with the second moments of what out_proj reads, which the fit does not change."""
    out_proj, bias = job.weights["out_proj"], job.mixer.out_proj.bias
    moment = SecondMoment(out_proj.shape[1], out_proj.device)
    cross = torch.zeros(out_proj.shape, dtype=torch.float64, device=out_proj.device)
    energy, count = 0.0, len(job.samples)
    pairs = zip(samples(job.samples, out_proj.device), samples(job.dense_output, out_proj.device), strict=True)
    for (i, sample), (_, dense) in pairs:
        job.report("out_proj", i, count)
        y = job.architecture.scanned(job.work, sample)[1][0].float()  # (L, D)
        target = (dense - sample)[0, :, : len(out_proj)]  # (L, d_model)
        target = target if bias is None else target - bias
        moment.add(y)
        cross += target.t() @ y
        energy += float(target.double().square().sum())
    job.report("out_proj", count, count)
    moment.pool()
    cross, energy, total = summed(cross), summed(energy), moment.total
    before = out_proj.double()
    fitted = before + fit(cross - before @ total, total)  # so the ridge pulls to what was there, not to zero
    out_proj.copy_(fitted)
    return OutProjRecord(*(_relative(weight, cross, total, energy) for weight in (fitted, before))), moment


def _relative(weight: torch.Tensor, cross: torch.Tensor, moment: torch.Tensor, energy: float) -> float:
    """sum |t - W y|^2 / sum |t|^2."""
    error = energy - 2 * float((weight * cross).sum()) + float(((weight @ moment) * weight).sum())
    return max(0.0, error) / energy if energy > 0 else 0.0
