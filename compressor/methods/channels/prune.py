"""Channel pruning of one layer: moments in one pass, the choice, and x_proj refitted on the channels that stay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch

from ssmc.compressor.calibration.placement import device_of, samples
from ssmc.compressor.methods.channels.score import ChannelScore, ScoredChannels
from ssmc.compressor.methods.method import Job, Record
from ssmc.compressor.methods.registry import score
from ssmc.compressor.methods.ridge import refit
from ssmc.compressor.methods.weights.second_moments import SecondMoment
from ssmc.compressor.options.patterns import CHANNEL, HEAD_DIM
from ssmc.runtime.collectives import share_of, summed
from ssmc.runtime.models import families

# The choice of channels and the fit of x_proj look at no more tokens than the larger of these: more say next to nothing
# new, and each costs two products with (D, D) matrices.
TOKENS, TOKENS_PER_CHANNEL = 65536, 32


@dataclass(frozen=True)
class ChannelsRecord(Record):
    """That channels went; which stay is in `LayerResult.channels_kept`."""

    name = "channels"


def prune_channels(job: Job, part: str = CHANNEL) -> None:
    """Choose the channels of a layer, refit x_proj on those that stay, and silence the others, in place.

    A Mamba-2 has no x_proj, and its channels go head by head. What out_proj can make up for is a later step of a layer,
    see `out_proj`. What follows works on a copy of the block without the channels that went, and costs only what is
    left.

    Args:
        job: the layer.
        part: of the pattern that asks for it, CHANNEL or HEAD.
    """
    judge, seen = cast(ChannelScore, score(part, job.config.score_of(part))), _look(job, part)
    heads, groups = None, 1
    if job.plan.has_heads:  # a head's channels have one rate between them and go together
        heads, groups = job.mixer.num_heads, len(job.architecture.rates(job.mixer))
    roots = job.prepared.get("channels")
    root = None if roots is None else roots[job.index]
    layer = ScoredChannels(job.weights["out_proj"], seen.moment, job.seed, heads, groups, seen.means, root)
    kept = judge.choose(layer, job.plan.keep.channels[job.index])
    if seen.read_by_x is not None:
        x_proj = job.weights["x_proj"]
        x_proj[:, kept] = refit(x_proj, seen.read_by_x.total, kept).to(x_proj)
    _keep(job, kept)


def prune_head_dims(job: Job, head_dim: int) -> None:
    """Choose `head_dim` channels of every head that is there, and go on with a block that has those only."""
    judge, seen = cast(ChannelScore, score(HEAD_DIM, job.config.score_of(HEAD_DIM))), _look(job, HEAD_DIM)
    weight, heads = job.weights["out_proj"], job.mixer.num_heads
    layer = ScoredChannels(weight, seen.moment, job.seed, weight.shape[1], heads, seen.means)  # single channels
    _keep(job, judge.choose(layer, heads * head_dim))


def _keep(job: Job, kept: list[int]) -> None:
    """Go on with a block of these channels only."""
    architecture, before = job.architecture, job.channels_kept
    architecture.mask(job.mixer, families.CHANNEL, kept)
    job.work = architecture.narrow(job.work, families.CHANNEL, kept)
    job.channels_kept = tuple(kept) if before is None else tuple(before[channel] for channel in kept)
    job.note(ChannelsRecord())


@dataclass(frozen=True)
class _Seen:
    """What choice and repair must know of the text, as far as they ask for it."""

    read_by_x: SecondMoment | None = None  # for the repair
    moment: torch.Tensor | None = None  # (D, D) of what out_proj reads
    means: torch.Tensor | None = None  # (D,) norm over samples of the mean absolute output of in_proj


def _look(job: Job, part: str) -> _Seen:
    """Run the layer on samples."""
    weights, device = job.weights, device_of(job.work)
    judge = cast(ChannelScore, score(part, job.config.score_of(part)))
    d_inner = weights["out_proj"].shape[1]
    wanted = (job.config.repair and "x_proj" in weights, judge.needs_text)
    read_by_x, read_by_out = (SecondMoment(d_inner, device) if want else None for want in wanted)
    if not any(wanted):
        return _Seen()
    squares = torch.zeros(d_inner, dtype=torch.float64, device=device)
    hidden = job.samples[: share_of(enough(job.samples.shape[1], d_inner))]  # samples come in random order
    for i, sample in samples(hidden, device):
        job.report("channels", i, len(hidden))
        u, y = job.architecture.scanned(job.work, sample)
        if read_by_x is not None:
            read_by_x.add(u)
        if read_by_out is not None:
            read_by_out.add(y)
        if judge.needs_means:
            x, _ = job.architecture.expand(job.mixer, job.architecture.normed(job.work, sample))
            squares += x[0, :, :d_inner].abs().mean(0).double().square()
    job.report("channels", len(hidden), len(hidden))
    for moment in (read_by_x, read_by_out):
        if moment is not None:
            moment.pool()
    means = summed(squares).sqrt() if judge.needs_means else None
    return _Seen(read_by_x, None if read_by_out is None else read_by_out.total, means)


def enough(length: int, d_inner: int) -> int:
    """How many samples of `length` tokens tell the second moments of `d_inner` channels."""
    return math.ceil(max(TOKENS, TOKENS_PER_CHANNEL * d_inner) / length)
