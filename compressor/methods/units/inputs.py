"""What reads the residual stream, corrected for what the stream lost on its way.

A layer of a pruned model reads x, what its norm makes of the pruned stream, where the dense model's layer reads x'. The
best linear estimate of x' is (I + M) x, M by least squares over the calibration tokens with a ridge that pulls to no
change. Every map W that reads x becomes W (I + M): nothing is added at run time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ssmc.compressor.calibration.placement import ahead, device_of
from ssmc.compressor.calibration.watched import watched
from ssmc.compressor.methods.method import Job
from ssmc.compressor.methods.ridge import fit
from ssmc.compressor.methods.weights.second_moments import SecondMoment
from ssmc.runtime.collectives import summed
from ssmc.runtime.models.architectures.units import find_module


def estimate_first(job: Job, dense: torch.Tensor) -> torch.Tensor:
    """M of what the first stage of a layer reads, (d_model, d_model).

    Args:
        job: of the layer.
        dense: (nsamples, L, d_model) what the layer reads in the dense model.
    """
    return _estimate(job, lambda hidden: job.architecture.normed(job.block, hidden), lambda hidden: hidden, dense)


def correct(job: Job, stage: int, change: torch.Tensor | None = None) -> None:
    """Correct the maps that read the stream of a stage, in place; `change` is M where it is known."""
    weights = [job.work.get_parameter(name).detach() for name in job.architecture.reading(job.work, stage)]
    if not weights:
        return
    if change is None:
        name = job.architecture.middle
        norm = find_module(job.work, name)
        assert norm is not None

        def between(hidden: torch.Tensor) -> torch.Tensor:
            return watched(job.architecture, job.work, hidden, [name])[1][name]

        change = _estimate(job, norm, between, job.targets[stage - 1])
    for weight in weights:  # those of experts stacked
        weight += (weight.double() @ change).to(weight)


def _estimate(
    job: Job,
    norm: nn.Module | Callable[[torch.Tensor], torch.Tensor],
    reach: Callable[[torch.Tensor], torch.Tensor],
    dense: torch.Tensor,
) -> torch.Tensor:
    """M of a norm that reads what `reach` makes of the layer's input, and `dense` in the dense model."""
    device = device_of(job.work)
    moment = cross = None
    pairs = zip(ahead(job.samples.split(1), device), ahead(dense.split(1), device), strict=True)
    for i, (sample, wanted) in enumerate(pairs):
        job.report("correcting what is read", i, len(job.samples))
        x, target = norm(reach(sample))[0].float(), norm(wanted)[0].float()
        if moment is None or cross is None:
            width = x.shape[1]
            moment, cross = SecondMoment(width, device), torch.zeros(width, width, dtype=torch.float64, device=device)
        moment.add(x)
        cross += (target - x).t() @ x
    assert moment is not None
    assert cross is not None
    moment.pool()
    return fit(summed(cross), moment.total)
