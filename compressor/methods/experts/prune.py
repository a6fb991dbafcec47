"""Experts and neurons of experts of one layer: what is read, the choice, and the removal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from ssmc.compressor.calibration.placement import device_of, samples
from ssmc.compressor.calibration.watched import watched
from ssmc.compressor.methods.channels.score import ChannelScore, ScoredChannels
from ssmc.compressor.methods.experts.score import ExpertScore, ScoredExperts
from ssmc.compressor.methods.method import Job, Record
from ssmc.compressor.methods.registry import score
from ssmc.compressor.methods.units.counts import units_to_keep
from ssmc.compressor.methods.weights.second_moments import SecondMoment
from ssmc.compressor.options.patterns import EXPERT, EXPERT_WIDTH
from ssmc.runtime.collectives import gathered
from ssmc.runtime.models.architectures.experts import ExpertNeurons, Experts, neurons_of


@dataclass(frozen=True)
class ExpertsRecord(Record):
    """That experts, or neurons of them, went; which stay is in `LayerResult.units_kept`."""

    name = "experts"


def prune_experts(job: Job) -> None:
    """Choose the experts of a layer that stay, and take the others out of it, in place."""
    judge = cast(ExpertScore, score(EXPERT, job.config.score_of(EXPERT)))
    for part, writer in job.architecture.mixtures_in(job.work):
        assert isinstance(part, Experts)
        module, config = part.inside(job.work), job.plan.model_config
        keep = units_to_keep(part, config, job.config.sparsity_of(EXPERT))
        if module is None or keep >= part.total(config):
            continue
        hidden = beside = None
        if judge.needs_text:
            behind = f"{part.name}.{part.behind}"
            others = [w.name for w in job.architecture.writers_in(job.work) if w.stage == writer.stage]
            hidden, beside = _read(job, part.name, [n for n in others if n != behind] if job.config.repair else [])
        kept = judge.choose(ScoredExperts(part, module, hidden, beside, job.seed), keep, part.groups(module))
        part.remove(module, kept)
        job.units_kept[EXPERT] = tuple(kept)
        job.note(ExpertsRecord())


def prune_neurons(job: Job) -> None:
    """Choose the neurons of every expert that stay, as many of each, and silence the others, in place."""
    judge = cast(ChannelScore, score(EXPERT_WIDTH, job.config.score_of(EXPERT_WIDTH)))
    for part in job.architecture.units:
        module = part.inside(job.work) if isinstance(part, ExpertNeurons) else None
        if module is None or not isinstance(part, ExpertNeurons):
            continue
        total = part.total(job.plan.model_config)
        keep = units_to_keep(part, job.plan.model_config, job.config.sparsity_of(EXPERT_WIDTH))
        if keep >= total:
            continue
        hidden = _read(job, part.name, [])[0] if judge.needs_text else None
        experts: nn.Module = module.experts
        kept: list[int] = []
        for expert, weight in enumerate(experts.down_proj.detach()):
            moment, means = (None, None) if hidden is None else _of_expert(part, module, hidden, expert)
            found = judge.choose(ScoredChannels(weight, moment, job.seed + expert, means=means), keep)
            kept += [expert * total + neuron for neuron in found]
        part.mask(module, kept)
        job.units_kept[EXPERT_WIDTH] = tuple(kept)
        job.note(ExpertsRecord())


def _read(job: Job, name: str, others: list[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a mixture reads, (T, d_model), and what other maps of the block read, (T, n); None without any.

    Of several processes each has the tokens of all.
    """
    hidden, beside = [], []
    for i, sample in samples(job.samples, device_of(job.work)):
        job.report("experts", i, len(job.samples))
        reads = watched(job.architecture, job.work, sample, [name, *others])[1]
        hidden.append(reads[name].flatten(0, -2).float())
        beside.append(torch.cat([reads[other].flatten(0, -2).float() for other in others], -1) if others else None)
    every = torch.cat(gathered(torch.cat(hidden)))
    return every, torch.cat(gathered(torch.cat(beside))) if others else None


def _of_expert(
    part: ExpertNeurons, module: nn.Module, hidden: torch.Tensor, expert: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the last map of an expert reads, weighed by the router: second moments, and mean absolute values."""
    _, weights, chosen = getattr(module, part.router)(hidden)
    tokens, places = (chosen == expert).nonzero(as_tuple=True)
    before = getattr(module, part.before or "-", None)
    x = hidden[tokens] if before is None else before(hidden[tokens])
    x = weights[tokens, places, None] * neurons_of(module.experts, x, expert)
    moment = SecondMoment(x.shape[1], x.device)
    moment.add(x)
    return moment.total, x.abs().double().sum(0) / max(1, len(x))
