"""Units of one layer: what is read from them, the choice, and the silence of the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from ssmc.compressor.calibration.placement import device_of, samples
from ssmc.compressor.calibration.watched import watched
from ssmc.compressor.methods.channels.prune import enough
from ssmc.compressor.methods.channels.score import ChannelScore, ScoredChannels
from ssmc.compressor.methods.method import Job, Record
from ssmc.compressor.methods.registry import score
from ssmc.compressor.methods.ridge import refit
from ssmc.compressor.methods.units.counts import units_to_keep
from ssmc.compressor.methods.weights.second_moments import SecondMoment
from ssmc.runtime.collectives import share_of, summed
from ssmc.runtime.models.architectures.units import Part, find_module


@dataclass(frozen=True)
class UnitsRecord(Record):
    """That units went; which stay is in `LayerResult.units_kept`."""

    name = "units"


def prune_units(job: Job, kind: str) -> None:
    """Choose the units of a kind that stay in a layer, and silence the others, in place."""
    for part in job.architecture.units:
        module = part.inside(job.work) if part.kind == kind else None
        if module is None:
            continue
        keep = units_to_keep(part, job.plan.model_config, job.config.sparsity_of(kind))
        total = part.total(job.plan.model_config)
        if keep < total:
            kept = _choose(job, part, module, keep)
            part.mask(module, kept)
            job.units_kept[kind] = tuple(kept)
            job.note(UnitsRecord())


def _choose(job: Job, part: Part, module: nn.Module, keep: int) -> list[int]:
    """The units that stay, ascending."""
    judge = cast(ChannelScore, score(part.kind, job.config.score_of(part.kind)))
    weight = _linear(module, part.reader).weight.detach()
    name = f"{part.name}.{part.reader}"
    moment, means = _read(job, name, weight.shape[1]) if judge.needs_text else (None, None)
    return choose_units(judge, part, module, keep, weight, moment, means, job.seed)


def choose_units(
    judge: ChannelScore,
    part: Part,
    module: nn.Module,
    keep: int,
    weight: torch.Tensor,
    moment: torch.Tensor | None,
    means: torch.Tensor | None,
    seed: int = 0,
) -> list[int]:
    """The units of a module that stay, ascending, as many of every group that stays.

    As many groups stay as can: only where `keep` is no multiple of their number do whole groups go, those that can be
    done without best, and then units of the others, judged by what the map reads from them alone.

    Args:
        judge: the score.
        part: what the module is.
        module: in the block.
        keep: how many units stay.
        weight: (d_model, in) of the map that reads them.
        moment: (in, in) of what it reads, where the score looks at text.
        means: (in,) mean absolute values of that.
        seed: of this layer.
    """
    width, groups = part.channels(module), part.groups(module)
    units = weight.shape[1] // width
    stay, each = _shape(keep, units, groups)
    columns = list(range(weight.shape[1]))
    if stay < groups:
        columns = judge.choose(ScoredChannels(weight, moment, seed, groups, 1, means), stay * (units // groups) * width)
        index = torch.as_tensor(columns, device=weight.device)
        if moment is not None:
            weight = refit(weight, moment, columns)
            moment = moment[index][:, index]
        else:
            weight = weight[:, index]
        means = None if means is None else means[index]
    heads = None if width == 1 else len(columns) // width
    found = judge.choose(ScoredChannels(weight, moment, seed, heads, stay, means), stay * each * width)
    return [columns[channel] // width for channel in found[::width]]


def _shape(keep: int, units: int, groups: int) -> tuple[int, int]:
    """Groups that stay and units in each, together `keep`: as many groups as can be."""
    stay = next(n for n in range(groups, 0, -1) if keep % n == 0 and keep // n <= units // groups)
    return stay, keep // stay


def _read(job: Job, name: str, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a linear map reads: second moments (in, in), and by column the norm over samples of the mean |x| (in,)."""
    device = device_of(job.work)
    moment, squares = SecondMoment(width, device), torch.zeros(width, dtype=torch.float64, device=device)
    hidden = job.samples[: share_of(enough(job.samples.shape[1], width))]
    for i, sample in samples(hidden, device):
        job.report("units", i, len(hidden))
        x = watched(job.architecture, job.work, sample, [name])[1][name][0].float()  # (L, in)
        moment.add(x)
        squares += x.abs().mean(0).double().square()
    moment.pool()
    return moment.total, summed(squares).sqrt()


def _linear(module: nn.Module, name: str) -> Any:
    found = find_module(module, name)
    assert found is not None
    return found
