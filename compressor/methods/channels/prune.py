"""Channel pruning of one layer: moments in one pass, the choice, and x_proj refitted on the channels that stay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

from ssmc.compressor.calibration.placement import device_of, samples
from ssmc.compressor.methods.channels.score import ChannelScore, ScoredChannels
from ssmc.compressor.methods.method import Job, Record
from ssmc.compressor.methods.registry import score
from ssmc.compressor.methods.ridge import refit
from ssmc.compressor.methods.weights.second_moments import SecondMoment
from ssmc.compressor.options.patterns import CHANNEL
from ssmc.runtime.models import families

# The choice of channels and the fit of x_proj look at no more tokens than the larger of these: more say next to nothing
# new, and each costs two products with (D, D) matrices.
TOKENS, TOKENS_PER_CHANNEL = 65536, 32


@dataclass(frozen=True)
class ChannelsRecord(Record):
    """That channels went; which stay is in `LayerResult.channels_kept`."""

    name = "channels"


def prune_channels(job: Job) -> None:
    """Choose the channels of a layer, refit x_proj on those that stay, and silence the others, in place.

    A Mamba-2 has no x_proj, and its channels go head by head. What out_proj can make up for is a later step of a layer,
    see `out_proj`. What follows works on a copy of the block without the channels that went, and costs only what is
    left.
    """
    architecture, mixer = job.architecture, job.mixer
    judge = cast(ChannelScore, score(CHANNEL, job.config.score_of(CHANNEL)))
    read_by_x, read_by_out = _moments(job, judge.needs_text)
    heads, groups = None, 1
    if job.plan.has_heads:  # a head's channels have one rate between them and go together
        heads, groups = mixer.num_heads, len(architecture.rates(mixer))
    moment = None if read_by_out is None else read_by_out.total
    layer = ScoredChannels(job.weights["out_proj"], moment, job.seed, heads, groups)
    kept = judge.choose(layer, job.plan.keep.channels[job.index])
    if read_by_x is not None:
        x_proj = job.weights["x_proj"]
        x_proj[:, kept] = refit(x_proj, read_by_x.total, kept).to(x_proj)
    architecture.mask(mixer, families.CHANNEL, kept)
    job.channels_kept = tuple(kept)
    job.work = architecture.narrow(job.work, families.CHANNEL, kept)
    job.note(ChannelsRecord())


def _moments(job: Job, for_out_proj: bool) -> tuple[SecondMoment | None, SecondMoment | None]:
    """Of what x_proj reads, for the repair, and of what out_proj reads, for a score that looks at it."""
    weights, device = job.weights, device_of(job.work)
    d_inner = weights["out_proj"].shape[1]
    wanted = (job.config.repair and "x_proj" in weights, for_out_proj)
    read_by_x, read_by_out = (SecondMoment(d_inner, device) if want else None for want in wanted)
    if not any(wanted):
        return read_by_x, read_by_out
    hidden = job.samples[: _enough(job.samples.shape[1], d_inner)]  # samples come in random order
    for i, sample in samples(hidden, device):
        job.report("channels", i, len(hidden))
        u, y = job.architecture.scanned(job.work, sample)
        if read_by_x is not None:
            read_by_x.add(u)
        if read_by_out is not None:
            read_by_out.add(y)
    job.report("channels", len(hidden), len(hidden))
    return read_by_x, read_by_out


def _enough(length: int, d_inner: int) -> int:
    """How many samples of `length` tokens tell the second moments of `d_inner` channels."""
    return math.ceil(max(TOKENS, TOKENS_PER_CHANNEL * d_inner) / length)
