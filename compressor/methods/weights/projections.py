"""The projections and conv1d of a layer: Hessians on what they really read, then SparseGPT, Wanda or magnitude."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ssmc.compressor.calibration.placement import HOST, Stage, device_of, put, samples, settle
from ssmc.compressor.methods.weights.depthwise import prune_depthwise
from ssmc.compressor.methods.weights.masks import NM, Target
from ssmc.compressor.methods.weights.second_moments import DepthwiseSecondMoment, SecondMoment, SquaredInputs
from ssmc.compressor.methods.weights.sensitivity import RANKED, allocate, sensitivity
from ssmc.compressor.methods.weights.sparsegpt import sparsegpt
from ssmc.compressor.methods.weights.wanda import magnitude, wanda
from ssmc.compressor.options.config import FFN, CompressConfig, FfnScore
from ssmc.runtime.models.families import Architecture
from ssmc.runtime.progress import Progress, silent

CONV = "conv1d"
Moments = dict[str, SecondMoment | DepthwiseSecondMoment]


@dataclass(frozen=True)
class ModuleResult:
    """What happened to one module of a layer."""

    name: str
    target: str | None  # sparsity aimed at, or N:M; None where it was left as it is
    zeros: float  # part of the weights that is zero now
    error: float | None  # squared error of its output relative to the output's energy; None when not measured
    left_out: str | None = None  # why it was left as it is


def module_targets(
    architecture: Architecture,
    model: nn.Module,
    hidden: torch.Tensor | None,
    config: CompressConfig,
    progress: Progress = silent,
    stage: Stage = HOST,
) -> list[dict[str, Target]]:
    """How sparse each module of each layer becomes: N:M, or Eq. 7 of SparseSSM from one pass over the dense model.

    Args:
        architecture: adapter of the model.
        model: dense.
        hidden: (nsamples, L, d_model) embeddings of the calibration samples, not modified; None without any.
        config: pattern, sparsity, alpha, targets.
        progress: told about layers.
        stage: where each layer is while it runs.
    """
    blocks = architecture.blocks(model)
    layers = len(blocks)
    if config.nm:
        return [dict.fromkeys(config.modules, config.nm) for _ in range(layers)]
    names = [name for name in config.modules if name in RANKED]
    if hidden is None or not names or config.alpha == 0:
        return [dict.fromkeys(config.modules, config.sparsity) for _ in range(layers)]
    sensitivities = _sensitivities(architecture, model, stage.place(hidden.clone()), names, progress, stage)
    ranked = allocate(sensitivities, config.sparsity, config.alpha)
    mixers = [layer for layer, block in enumerate(blocks) if architecture.mixer(block) is not None]
    targets = [dict.fromkeys(config.modules, config.sparsity) for _ in range(layers)]
    for name, sparsities in ranked.items():
        for layer, sparsity in zip(mixers, sparsities, strict=True):
            targets[layer][name] = sparsity
    return targets


def _sensitivities(
    architecture: Architecture,
    model: nn.Module,
    hidden: torch.Tensor,
    names: Sequence[str],
    progress: Progress,
    stage: Stage,
) -> dict[str, list[float]]:
    """trace(H) / size of each module in each layer; the trace alone needs no matrix product."""
    found: dict[str, list[float]] = {name: [] for name in names}
    blocks = architecture.blocks(model)
    for index, block in stage.each(blocks):
        progress("sensitivity of the layers (Eq. 7)", index, len(blocks))
        if architecture.mixer(block) is None:
            for i, sample in samples(hidden, device_of(block)):
                put(hidden, i, architecture.run(block, sample))
            settle(hidden, device_of(block))
            continue
        weights = architecture.module_weights(architecture.mixer(block))
        device = device_of(block)
        sums = {name: SquaredInputs(weights[name].shape[1], device) for name in names}
        for i, sample in samples(hidden, device):
            inputs, output = architecture.module_inputs(block, sample)
            put(hidden, i, output)
            for name in names:
                sums[name].add(inputs[name])
        settle(hidden, device)
        for name in names:
            found[name].append(sensitivity(sums[name].total, weights[name].numel()))
    return found


def prune_modules(
    architecture: Architecture,
    block: nn.Module,
    hidden: torch.Tensor | None,
    targets: Mapping[str, Target],
    score: FfnScore,
    progress: Progress = silent,
    label: str = "Hessians",
) -> list[ModuleResult]:
    """Prune modules of one layer in place.

    All Hessians come from one pass over the layer as it is before any of them is touched.

    Args:
        architecture: adapter of the model.
        block: the layer.
        hidden: (nsamples, L, d_model) what the layer reads; None for magnitude, which looks at no data.
        targets: sparsity or N:M by module name.
        score: how to prune.
        progress: told about samples.
        label: what to call the work.
    """
    weights = architecture.module_weights(architecture.mixer(block))
    targets = {name: target for name, target in targets.items() if name in weights}  # a Mamba-2 has no x_proj
    moments: Moments = {}
    if hidden is not None and score is not FfnScore.magnitude:
        moments = _moments(architecture, block, hidden, {n: weights[n] for n in targets}, progress, label)
    targets = {name: targets[name] for name in FFN if name in targets}
    return _prune_each(weights, targets, moments, score)


def _prune_each(
    weights: Mapping[str, torch.Tensor], targets: Mapping[str, Target], moments: Moments, score: FfnScore
) -> list[ModuleResult]:
    """Prune the weights that have a target, in place."""
    results = []
    for name, target in targets.items():
        weight, error = weights[name], None
        if _takes(weight, target):
            pruned, error = _prune(name, weight, moments.get(name), target, score)
            weight.copy_(pruned)
        zeros = int((weight == 0).sum()) / weight.numel()
        if _takes(weight, target):
            results.append(ModuleResult(name, _text(target), zeros, error))
        else:
            reason = f"{weight.shape[1]} inputs are no groups of {target.m}"
            results.append(ModuleResult(name, None, zeros, error, reason))
    return results


def prune_linears(
    architecture: Architecture,
    block: nn.Module,
    hidden: torch.Tensor | None,
    config: CompressConfig,
    progress: Progress = silent,
    label: str = "Hessians",
) -> list[ModuleResult]:
    """Prune what a block of a hybrid has beside its mixer, the linear maps of attention and MLP, in place.

    All Hessians come from one pass. Experts of a mixture are one tensor for all of them and stay dense.

    Args:
        architecture: adapter of the model.
        block: the layer.
        hidden: (nsamples, L, d_model) what the layer reads; None for magnitude, which looks at no data.
        config: sparsity or N:M, and how to prune; nothing happens unless all modules are to be pruned.
        progress: told about samples.
        label: what to call the work.
    """
    linears = architecture.linears(block)
    if not linears or set(config.modules) != set(FFN):
        return []
    moments: Moments = {}
    if hidden is not None and config.ffn_score is not FfnScore.magnitude:
        moments = _moments_of_linears(architecture, block, hidden, linears, progress, label)
    weights = {name: linear.weight.data for name, linear in linears.items()}
    return _prune_each(weights, dict.fromkeys(weights, config.nm or config.sparsity), moments, config.ffn_score)


def _moments_of_linears(
    architecture: Architecture,
    block: nn.Module,
    hidden: torch.Tensor,
    linears: Mapping[str, nn.Linear],
    progress: Progress,
    label: str,
) -> Moments:
    """Second moments of what linear maps read when the whole block runs."""
    device = device_of(block)
    moments: Moments = {name: SecondMoment(linear.in_features, device) for name, linear in linears.items()}
    hooks = [
        linear.register_forward_pre_hook(lambda _, args, moment=moments[name]: moment.add(args[0]))
        for name, linear in linears.items()
    ]
    try:
        for i, sample in samples(hidden, device):
            progress(label, i, len(hidden))
            architecture.run(block, sample)
    finally:
        for hook in hooks:
            hook.remove()
    progress(label, len(hidden), len(hidden))
    return moments


def _takes(weight: torch.Tensor, target: Target) -> bool:
    """Whether the inputs of a module are whole groups of N:M; one whose are not is left as it is."""
    return not isinstance(target, NM) or weight.shape[1] % target.m == 0


def _text(target: Target) -> str:
    return str(target) if isinstance(target, NM) else f"{target:.4f}"


def _moments(
    architecture: Architecture,
    block: nn.Module,
    hidden: torch.Tensor,
    weights: Mapping[str, torch.Tensor],
    progress: Progress,
    label: str,
) -> Moments:
    device = device_of(block)
    moments: Moments = {
        name: (DepthwiseSecondMoment(*w.shape, device) if name == CONV else SecondMoment(w.shape[1], device))
        for name, w in weights.items()
    }
    for i, sample in samples(hidden, device):
        progress(label, i, len(hidden))
        inputs, _ = architecture.module_inputs(block, sample)
        for name, moment in moments.items():
            moment.add(inputs[name])
    progress(label, len(hidden), len(hidden))
    return moments


def _prune(
    name: str,
    weight: torch.Tensor,
    moment: SecondMoment | DepthwiseSecondMoment | None,
    target: Target,
    score: FfnScore,
) -> tuple[torch.Tensor, float | None]:
    """The pruned weight (out, in), or (D, K) for conv1d, and its relative output error where it is known."""
    if score is FfnScore.magnitude or moment is None:
        return weight * magnitude(weight, target), None
    if score is FfnScore.wanda:
        return weight * wanda(weight, moment.total.diagonal(dim1=-2, dim2=-1), target), None
    result = prune_depthwise(weight, moment.total, target) if name == CONV else sparsegpt(weight, moment.total, target)
    return result.weight.to(weight.dtype), result.error
