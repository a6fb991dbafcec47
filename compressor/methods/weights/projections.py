"""The projections and conv1d of a layer: second moments of what they really read, then the score prunes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import nn

from ssmc.compressor.calibration.placement import device_of, put, samples, settle
from ssmc.compressor.methods.method import Job, Record, Survey
from ssmc.compressor.methods.registry import score
from ssmc.compressor.methods.weights.score import Moment, WeightScore
from ssmc.compressor.methods.weights.second_moments import DepthwiseSecondMoment, SecondMoment, SquaredInputs
from ssmc.compressor.methods.weights.sensitivity import RANKED, allocate, sensitivity
from ssmc.compressor.options.config import PROJECTIONS
from ssmc.compressor.options.patterns import WEIGHTS
from ssmc.compressor.options.sparsity import NM, Sparsity

CONV = "conv1d"


@dataclass(frozen=True)
class ModuleResult:
    """What happened to one module of a layer."""

    name: str
    target: str | None  # sparsity aimed at, or N:M; None where it was left as it is
    zeros: float  # part of the weights that is zero now
    error: float | None  # squared error of its output relative to the output's energy; None when not measured
    left_out: str | None = None  # why it was left as it is


@dataclass(frozen=True)
class WeightsRecord(Record):
    """What happened to the modules of a layer."""

    name = "weights"

    modules: tuple[ModuleResult, ...]

    def as_manifest(self) -> dict[str, Any]:
        """One entry a module."""
        return {"modules": [asdict(module) for module in self.modules]}


def sparsities_of_modules(survey: Survey) -> list[dict[str, Sparsity]]:
    """How sparse each module of each layer becomes: N:M, or Eq. 7 of SparseSSM from one pass over the dense model."""
    architecture, config = survey.plan.architecture, survey.plan.config
    blocks = architecture.blocks(survey.model)
    layers = len(blocks)
    uniform: Sparsity = config.nm or config.sparsity_of(config.parts[0])
    sparsities: list[dict[str, Sparsity]] = [dict.fromkeys(config.modules, uniform) for _ in range(layers)]
    names = [name for name in config.modules if name in RANKED]
    if isinstance(uniform, NM) or survey.hidden is None or not names or config.alpha == 0:
        return sparsities
    ranked = allocate(_sensitivities(survey, survey.hidden, names), uniform, config.alpha)
    mixers = [layer for layer, block in enumerate(blocks) if architecture.mixer(block) is not None]
    for name, of_layers in ranked.items():
        for layer, sparsity in zip(mixers, of_layers, strict=True):
            sparsities[layer][name] = sparsity
    return sparsities


def _sensitivities(survey: Survey, embedded: torch.Tensor, names: Sequence[str]) -> dict[str, list[float]]:
    """trace(H) / size of each module in each layer; the trace alone needs no matrix product."""
    architecture, stage = survey.plan.architecture, survey.stage
    hidden = stage.copied(embedded)
    found: dict[str, list[float]] = {name: [] for name in names}
    blocks = architecture.blocks(survey.model)
    for index, block in stage.each(blocks):
        survey.progress("sensitivity of the layers (Eq. 7)", index, len(blocks))
        device = device_of(block)
        if architecture.mixer(block) is None:
            for i, sample in samples(hidden, device):
                put(hidden, i, architecture.run(block, sample))
            settle(hidden, device)
            continue
        weights = architecture.module_weights(architecture.mixer(block))
        sums = {name: SquaredInputs(weights[name].shape[1], device) for name in names}
        for i, sample in samples(hidden, device):
            inputs, output = architecture.module_inputs(block, sample)
            put(hidden, i, output)
            for name in names:
                sums[name].add(inputs[name])
        settle(hidden, device)
        for name in names:
            sums[name].pool()
            found[name].append(sensitivity(sums[name].total, weights[name].numel()))
    return found


def prune_modules(job: Job, sparsities: Mapping[str, Sparsity]) -> None:
    """Prune modules of the mixer of one layer in place.

    All second moments come from one pass over the layer as it is before any of them is touched.

    Args:
        job: the layer, and what it reads.
        sparsities: how sparse each module becomes, by name.
    """
    weights = job.weights
    wanted = {name: sparsities[name] for name in PROJECTIONS if name in sparsities and name in weights}
    judge = weight_score(job)
    moments: dict[str, Moment] = {}
    if job.hidden is not None and judge.needs_text:
        moments = _moments(job, {name: weights[name] for name in wanted})
    job.note(WeightsRecord(tuple(_prune_each(weights, wanted, moments, judge))))


def prune_linears(job: Job) -> None:
    """Prune what a block of a hybrid has beside its mixer, the linear maps of attention and MLP, in place.

    All second moments come from one pass. Experts of a mixture are one tensor for all of them and stay dense.
    """
    linears, judge = job.architecture.linears(job.work), weight_score(job)
    if not linears:
        return
    moments: dict[str, Moment] = {}
    if job.hidden is not None and judge.needs_text:
        moments = _moments_of_linears(job, linears)
    weights = {name: linear.weight.data for name, linear in linears.items()}
    sparsity: Sparsity = job.config.nm or job.config.sparsity_of(job.config.parts[0])
    pruned = _prune_each(weights, dict.fromkeys(weights, sparsity), moments, judge)
    before = job.find(WeightsRecord)
    job.note(WeightsRecord((*(before.modules if before else ()), *pruned)))


def weight_score(job: Job) -> WeightScore:
    """The score that decides about the weights of modules in this run."""
    return cast(WeightScore, score(WEIGHTS, job.config.ffn_score))


def _prune_each(
    weights: Mapping[str, torch.Tensor],
    sparsities: Mapping[str, Sparsity],
    moments: Mapping[str, Moment],
    judge: WeightScore,
) -> list[ModuleResult]:
    """Prune the weights that are to be sparse, in place."""
    results = []
    for name, sparsity in sparsities.items():
        weight, error, reason = weights[name], None, _reason_to_leave_out(weights[name], sparsity)
        if reason is None:
            pruned, error = judge.prune(weight, moments.get(name), sparsity)
            weight.copy_(pruned)
        zeros = int((weight == 0).sum()) / weight.numel()
        text = str(sparsity) if isinstance(sparsity, NM) else f"{sparsity:.4f}"
        results.append(ModuleResult(name, text if reason is None else None, zeros, error, reason))
    return results


def _moments(job: Job, weights: Mapping[str, torch.Tensor]) -> dict[str, Moment]:
    """Second moments of what modules of the mixer read."""
    device, count = device_of(job.work), len(job.samples)
    moments: dict[str, Moment] = {
        name: (
            DepthwiseSecondMoment(w.shape[0], w.shape[1], device) if name == CONV else SecondMoment(w.shape[1], device)
        )
        for name, w in weights.items()
    }
    for i, sample in samples(job.samples, device):
        job.report("Hessians", i, count)
        inputs, _ = job.architecture.module_inputs(job.work, sample)
        for name, moment in moments.items():
            moment.add(inputs[name])
    job.report("Hessians", count, count)
    for moment in moments.values():
        moment.pool()
    return moments


def _moments_of_linears(job: Job, linears: Mapping[str, nn.Linear]) -> dict[str, Moment]:
    """Second moments of what linear maps read when the whole block runs."""
    device, count = device_of(job.work), len(job.samples)
    moments = {name: SecondMoment(linear.in_features, device) for name, linear in linears.items()}
    hooks = [
        linear.register_forward_pre_hook(lambda _, args, moment=moments[name]: moment.add(args[0]))
        for name, linear in linears.items()
    ]
    try:
        for i, sample in samples(job.samples, device):
            job.report("Hessians of attention and MLP", i, count)
            job.architecture.run(job.work, sample)
    finally:
        for hook in hooks:
            hook.remove()
    job.report("Hessians of attention and MLP", count, count)
    for moment in moments.values():
        moment.pool()
    return dict(moments)


def _reason_to_leave_out(weight: torch.Tensor, sparsity: Sparsity) -> str | None:
    """Why a module is left as it is: its inputs are no whole groups of N:M."""
    if not isinstance(sparsity, NM) or weight.shape[1] % sparsity.m == 0:
        return None
    return f"{weight.shape[1]} inputs are no groups of {sparsity.m}"
