"""Channel pruning of one layer: moments in one pass, the choice, then out_proj fitted to the dense model in another."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from ssmc.compressor.calibration.placement import device_of, samples
from ssmc.compressor.methods.channels.heads import channels_of, choose_heads
from ssmc.compressor.methods.channels.obs import choose_channels, fit, refit
from ssmc.compressor.methods.weights.second_moments import SecondMoment
from ssmc.compressor.options.patterns import BLIND, Score
from ssmc.runtime.models import families
from ssmc.runtime.models.families import Architecture
from ssmc.runtime.progress import Progress, silent

# The choice of channels and the fit of x_proj look at no more tokens than the larger of these: more say next to nothing
# new, and each costs two products with (D, D) matrices.
TOKENS, TOKENS_PER_CHANNEL = 65536, 32


@dataclass(frozen=True)
class Fitted:
    """What fitting out_proj achieved: squared errors of what a layer adds, relative to what it should add."""

    error: float
    error_unrepaired: float  # with the columns out_proj had before


def prune_channels(
    architecture: Architecture,
    block: nn.Module,
    hidden: torch.Tensor | None,
    score: Score,
    keep: int,
    repair: bool,
    seed: int,
    progress: Progress = silent,
    label: str = "channels",
) -> list[int]:
    """Choose the channels of a layer, refit x_proj on those that stay, and silence the others, in place.

    A Mamba-2 has no x_proj, and its channels go head by head.

    Args:
        architecture: adapter of the model.
        block: the layer.
        hidden: (nsamples, L, d_model) what it reads; None if nothing is decided or fitted by it.
        score: how channels are judged.
        keep: how many stay.
        repair: whether to refit x_proj. What out_proj can make up for is the last step of a layer, see `fit_out_proj`.
        seed: for the score `random`.
        progress: told about samples.
        label: what to call the work.

    Returns:
        The kept channels, ascending.
    """
    mixer = architecture.mixer(block)
    weights = architecture.module_weights(mixer)
    d_inner = weights["out_proj"].shape[1]
    read_by_x, read_by_out = (
        SecondMoment(d_inner, mixer.D.device) if wanted else None
        for wanted in (repair and "x_proj" in weights, score not in BLIND)
    )
    if read_by_x or read_by_out:
        hidden = hidden[: _enough(hidden.shape[1], d_inner)]  # samples come in random order
        for i, sample in samples(hidden, device_of(block)):
            progress(label, i, len(hidden))
            u, y = architecture.scanned(block, sample)
            if read_by_x:
                read_by_x.add(u)
            if read_by_out:
                read_by_out.add(y)
        progress(label, len(hidden), len(hidden))
    generator = torch.Generator().manual_seed(seed)
    moment = read_by_out.total if read_by_out else None
    if architecture.capabilities.heads:  # a head's channels have one rate between them and go together
        P, groups = mixer.head_dim, len(architecture.rates(mixer))
        heads = choose_heads(score, weights["out_proj"], moment, keep // P, d_inner // P, groups, generator)
        kept = channels_of(heads, P)
    else:
        kept = choose_channels(score, weights["out_proj"], moment, keep, generator)
    if read_by_x:
        x_proj = weights["x_proj"]
        x_proj[:, kept] = refit(x_proj, read_by_x.total, kept).to(x_proj)
    architecture.mask(mixer, families.CHANNEL, kept)
    return kept


def _enough(length: int, d_inner: int) -> int:
    """How many samples of `length` tokens tell the second moments of `d_inner` channels."""
    return math.ceil(max(TOKENS, TOKENS_PER_CHANNEL * d_inner) / length)


def fit_out_proj(
    architecture: Architecture,
    block: nn.Module,
    hidden: torch.Tensor,
    stream: torch.Tensor,
    progress: Progress = silent,
    label: str = "fit",
) -> Fitted:
    """Fit out_proj, in place, so that the block's output comes closest to the dense model's.

    The target is the dense model's residual stream behind this layer less the pruned model's before it. So the layer
    also makes up for what the layers before it lost, removed ones included.

    Args:
        architecture: adapter of the model.
        block: the pruned layer, without the channels that went.
        hidden: (nsamples, L, d_model) what it reads in the pruned model.
        stream: (nsamples, L, d_model) what the dense layer puts out in the dense model.
        progress: told about samples.
        label: what to call the work.
    """
    out_proj = architecture.module_weights(architecture.mixer(block))["out_proj"]
    bias = architecture.mixer(block).out_proj.bias
    moment = SecondMoment(out_proj.shape[1], out_proj.device)
    cross = torch.zeros(out_proj.shape, dtype=torch.float64, device=out_proj.device)
    energy = 0.0
    pairs = zip(samples(hidden, out_proj.device), samples(stream, out_proj.device), strict=True)
    for (i, sample), (_, dense) in pairs:
        progress(label, i, len(hidden))
        y = architecture.scanned(block, sample)[1][0].float()  # (L, D)
        target = (dense - sample)[0, :, : len(out_proj)]  # (L, d_model)
        target = target if bias is None else target - bias
        moment.add(y)
        cross += target.t() @ y
        energy += float(target.double().square().sum())
    progress(label, len(hidden), len(hidden))
    total = moment.total
    before = out_proj.double()
    fitted = before + fit(cross - before @ total, total)  # so the ridge pulls to what was there, not to zero
    out_proj.copy_(fitted)
    return Fitted(*(_relative(weight, cross, total, energy) for weight in (fitted, before)))


def _relative(weight: torch.Tensor, cross: torch.Tensor, moment: torch.Tensor, energy: float) -> float:
    """sum |t - W y|^2 / sum |t|^2."""
    error = energy - 2 * float((weight * cross).sum()) + float(((weight @ moment) * weight).sum())
    return max(0.0, error) / energy if energy > 0 else 0.0
