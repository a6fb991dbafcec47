"""All linear maps that add to the residual stream, fitted to that of the dense model.

Whatever was removed in a block or before it, what is missing from the residual stream is known: the dense model's
stream behind a stage of the block, less the pruned model's. The maps of the stage get the change that takes away most
of it, by least squares on what they read in the pruned model, with a ridge that pulls to no change. Maps that add to
the same stream, as attention beside a mixer, are fitted together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ssmc.compressor.calibration.placement import ahead, device_of
from ssmc.compressor.calibration.watched import watched
from ssmc.compressor.methods.experts.fit import fit_experts
from ssmc.compressor.methods.method import Job, Record
from ssmc.compressor.methods.ridge import fit
from ssmc.compressor.methods.units.inputs import correct
from ssmc.compressor.methods.weights.second_moments import SecondMoment
from ssmc.runtime.collectives import gathered, summed
from ssmc.runtime.models.architectures.experts import Mixture
from ssmc.runtime.models.architectures.units import Writer, find_module


@dataclass(frozen=True)
class StageFit:
    """What the fit of one stage achieved: squared errors of what it adds to the stream, relative to what it should."""

    maps: tuple[str, ...]
    error: float
    error_unrepaired: float


@dataclass(frozen=True)
class StreamRecord(Record):
    """What fitting a block to the dense model's residual stream achieved."""

    name = "stream"

    stages: tuple[StageFit, ...]

    def as_manifest(self) -> dict[str, Any]:
        """Errors by stage."""
        return {"stream": [asdict(stage) for stage in self.stages]}


def fit_stream(job: Job) -> StreamRecord:
    """Fit the maps of every stage of a block, in place, one stage after the other."""
    writers, done = job.architecture.writers_in(job.work), []
    last = len(job.targets) - 1
    for stage in range(len(job.targets)):
        if stage:
            correct(job, stage)
        own = [writer for writer in writers if min(writer.stage, last) == stage]
        if own:
            done.append(_fit_stage(job, stage, own))
        for part, writer in job.architecture.mixtures_in(job.work):
            if min(writer.stage, last) == stage and f"{part.name}.{part.behind}" not in [w.name for w in own]:
                done.append(_fit_mixture(job, stage, part, writer))
    return StreamRecord(tuple(done))


def _fit_stage(job: Job, stage: int, writers: Sequence[Writer]) -> StageFit:
    """Fit the maps of one stage together."""
    maps = [find_module(job.work, writer.name) for writer in writers]
    weights = [linear.weight.detach() for linear in maps if linear is not None]
    # columns of zeros are read from what was removed, and stay so
    alive = [(weight != 0).any(0).nonzero()[:, 0] for weight in weights]
    device, width = device_of(job.work), sum(map(len, alive))
    moment = SecondMoment(width, device)
    cross = torch.zeros(len(weights[0]), width, dtype=torch.float64, device=device)
    wrong = energy = 0.0
    for i, (before, target, after, reads) in enumerate(_missing(job, stage, [writer.name for writer in writers])):
        job.report("fitting to the dense model", i, len(job.samples))
        scaled = [
            w.scale_in(job.work) * reads[w.name].flatten(0, -2)[:, a] for w, a in zip(writers, alive, strict=True)
        ]
        x = torch.cat(scaled, dim=-1).float()  # (L, in)
        missing = (target - after)[0, :, : len(cross)].float()  # (L, d_model)
        moment.add(x)
        cross += missing.t() @ x
        wrong += float(missing.double().square().sum())
        energy += float((target - before)[0, :, : len(cross)].double().square().sum())
    moment.pool()
    cross, wrong, energy, total = summed(cross), summed(wrong), summed(energy), moment.total
    change = fit(cross, total)
    for weight, index, part in zip(weights, alive, change.split([len(a) for a in alive], dim=1), strict=True):
        weight[:, index] = (weight[:, index].double() + part).to(weight)
    left = wrong - 2 * float((change * cross).sum()) + float(((change @ total) * change).sum())
    errors = [max(0.0, e) / energy if energy > 0 else 0.0 for e in (left, wrong)]
    return StageFit(tuple(writer.name for writer in writers), *errors)


def _fit_mixture(job: Job, stage: int, part: Mixture, writer: Writer) -> StageFit:
    """Fit the last maps of all experts, one after the other."""
    module, read, lacks = part.inside(job.work), [], []
    assert module is not None
    wrong = energy = 0.0
    for i, (before, target, after, reads) in enumerate(_missing(job, stage, [part.name])):
        job.report("fitting experts to the dense model", i, len(job.samples))
        missing = (target - after)[0].float()  # (L, d_model)
        read.append(reads[part.name].flatten(0, -2).float())
        lacks.append(missing)
        wrong += float(missing.double().square().sum())
        energy += float((target - before)[0].double().square().sum())
    wrong, energy = summed(wrong), summed(energy)
    pieces = zip(gathered(torch.cat(read)), gathered(torch.cat(lacks)), strict=True)  # of all processes
    left = fit_experts(part, module, writer.scale_in(job.work), pieces)
    return StageFit((writer.name,), *(e / energy if energy > 0 else 0.0 for e in (left, wrong)))


def _missing(job: Job, stage: int, names: Sequence[str]) -> Any:
    """By sample: the stream before a stage, the dense model's behind it, the pruned model's, and what maps read."""
    architecture, device, last = job.architecture, device_of(job.work), len(job.targets) - 1
    middle = [architecture.middle] if last else []
    pairs = zip(ahead(job.samples.split(1), device), ahead(job.targets[stage].split(1), device), strict=True)
    for sample, target in pairs:
        output, reads = watched(architecture, job.work, sample, [*names, *middle])
        between = reads[middle[0]] if middle else output
        yield (sample if stage == 0 else between), target, (output if stage == last else between), reads
