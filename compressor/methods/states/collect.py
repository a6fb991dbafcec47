"""Run a layer over the calibration samples and feed its hidden states to streaming sums."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from ssmc.compressor.calibration.placement import ahead, device_of
from ssmc.compressor.methods.method import Job
from ssmc.compressor.methods.states.statistics import Chunk, Statistic
from ssmc.runtime.progress import NO_PROGRESS
from ssmc.runtime.scan import accelerator, scan_states
from ssmc.runtime.scan.moments import STRETCH

PROJECTED = {"cpu": 512, "cuda": 8192}  # tokens that pass in_proj together: enough to keep the matrix product busy
SUMMED = 8192  # tokens together where a GPU sums over the states without keeping them
STATE_BYTES = {"cpu": 8 << 20, "cuda": 1 << 30}  # hidden states kept at once: what fits a cache; what fills a GPU


def collect(
    job: Job,
    statistics: Sequence[Statistic],
    group: int = 0,
    backend: str = "auto",
    weights: torch.Tensor | None = None,
) -> None:
    """Run a layer over all samples, a stretch of time after the other, and feed its hidden states to `statistics`.

    Time is the outer loop because two scores need all samples' states of a time step together. Between stretches a
    sample carries its state (D, N) and the convolution's window, so no stretch is computed twice.

    Args:
        job: the layer and what it reads. Pieces of text, of any lengths, serve for statistics that do not need all
            samples of a time step together.
        statistics: sums to fill; nothing runs when there are none.
        group: the one whose states are wanted, where channels have several B and C.
        backend: of the scan. One that runs on a GPU hands over sums instead of states if nobody needs more.
        weights: (nsamples, L) how much an error at each token counts, for statistics that take weights; None: all the
            same. Not for pieces of text.
    """
    if not statistics or job.hidden is None:
        return
    if not isinstance(job.hidden, torch.Tensor):
        for piece in job.hidden:
            collect(replace(job, hidden=piece, progress=NO_PROGRESS), statistics, group, backend)
        return
    if _sums_suffice(job, statistics, backend):
        for weighed in (True, False):  # two passes where tokens count, and some sums do not know of it
            some = [
                statistic for statistic in statistics if (statistic.takes_weights and weights is not None) is weighed
            ]
            if some:
                _collect_sums(job, some, group, backend, weights if weighed else None)
    else:
        _collect_states(job, statistics, group, weights)
    for statistic in statistics:
        statistic.pool()


def _collect_states(job: Job, statistics: Sequence[Statistic], group: int, weights: torch.Tensor | None) -> None:
    """As `collect`, a stretch of time after the other."""
    hidden, device = job.samples, device_of(job.work)
    nsamples, length, _ = hidden.shape
    carried = _Carried(nsamples)
    groups = list(_slices(nsamples, max(1, PROJECTED[device.type] // STRETCH)))
    pieces = (hidden[rows, start : start + STRETCH] for start in range(0, length, STRETCH) for rows in groups)
    stretches = ahead(pieces, device)
    for start in range(0, length, STRETCH):
        job.report("statistics", start, length)
        for rows in groups:
            for chunk in _chunks(job, next(stretches), carried, rows, start, group, weights):
                for statistic in statistics:
                    statistic.add(chunk)
        for statistic in statistics:
            statistic.end_of_stretch()
    job.report("statistics", length, length)


def _sums_suffice(job: Job, statistics: Sequence[Statistic], backend: str) -> bool:
    """Whether the layer is where a kernel can sum over its states, and the sums are all that is wanted."""
    if not (job.architecture.capabilities.gpu_sums and all(statistic.takes_moments for statistic in statistics)):
        return False
    return accelerator(backend, list(job.work.parameters())) is not None


def _collect_sums(
    job: Job, statistics: Sequence[Statistic], group: int, backend: str, weights: torch.Tensor | None
) -> None:
    """As `collect`, a few whole samples at a time, without the states themselves."""
    architecture, mixer, hidden = job.architecture, job.mixer, job.samples
    nsamples, length, _ = hidden.shape
    groups = list(_slices(nsamples, max(1, SUMMED // length)))
    pieces = ahead((hidden[rows] for rows in groups), device_of(job.work))
    for rows, piece in zip(groups, pieces, strict=True):
        job.report("statistics", rows.start, nsamples)
        x, z = architecture.expand(mixer, architecture.normed(job.work, piece))
        inputs = architecture.scan_inputs(mixer, x, z, fused=True)
        counts = None if weights is None else weights[rows].to(x.device)
        moments = architecture.moments(mixer, inputs, group, backend, counts)
        for statistic in statistics:
            statistic.add_moments(moments)
    job.report("statistics", nsamples, nsamples)


class _Carried:
    """What each sample takes from one stretch of time to the next; allocated when the shapes are known."""

    def __init__(self, nsamples: int):
        self.nsamples = nsamples
        self.states: Any = None  # (nsamples, D, N)
        self.history: Any = None  # (nsamples, d_conv - 1, D)

    def allocate(self, x: torch.Tensor, rates: torch.Tensor, d_conv: int) -> None:
        if self.states is None:
            self.states = x.new_zeros(self.nsamples, *rates.shape, dtype=torch.float32)
            self.history = x.new_zeros(self.nsamples, d_conv - 1, x.shape[2])


def _chunks(
    job: Job,
    hidden: torch.Tensor,
    carried: _Carried,
    rows: slice,
    start: int,
    group: int,
    weights: torch.Tensor | None,
) -> Iterator[Chunk]:
    """Hidden states of a group over a stretch (rows, T, d_model), a few samples at a time."""
    architecture, mixer = job.architecture, job.mixer
    x, z = architecture.expand(mixer, architecture.normed(job.work, hidden))
    rates = architecture.rates(mixer)[group]  # (D, N)
    carried.allocate(x, rates, mixer.conv_kernel_size)
    history = carried.history[rows]
    inputs = architecture.scan_groups(mixer, architecture.scan_inputs(mixer, x, z, history))[group]
    carried.history[rows] = torch.cat([history, x], dim=1)[:, x.shape[1] :]
    per_sample = (x.shape[1] + 1) * rates.numel() * 4  # bytes of hidden states
    for few in _slices(inputs.batch, max(1, STATE_BYTES[x.device.type] // per_sample)):
        here = slice(rows.start + few.start, rows.start + few.stop)
        part = inputs.sequences(few)
        states = scan_states(part, carried.states[here])
        carried.states[here] = states[:, -1].transpose(1, 2)
        gains = architecture.gains(mixer, group, part, states[:, 1:])
        counts = None if weights is None else weights[here, start : start + x.shape[1]].to(x.device)
        yield Chunk(start, part, states, gains, counts)


def _slices(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))
