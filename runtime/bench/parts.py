"""The parts of a layer, each alone on what it reads in that layer, and the head: where the time of a model goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ssmc.runtime.bench.results import Measurement
from ssmc.runtime.bench.settings import Settings
from ssmc.runtime.measure import workloads
from ssmc.runtime.measure.sources import Subject
from ssmc.runtime.measure.timing import interleave, paired_ratio
from ssmc.runtime.models.families import Architecture
from ssmc.runtime.progress import NO_PROGRESS, Progress
from ssmc.runtime.scan import accelerator

KIND = "part"
SHARE = 0.1  # of the time budget for all of them

Run = Callable[[], torch.Tensor]


def measure_parts(
    subjects: Sequence[Subject], settings: Settings, device: torch.device, progress: Progress = NO_PROGRESS
) -> list[Measurement]:
    """Time every part of all subjects, which are on `device`, at the longest prefill and the smallest batch."""
    if not subjects:
        return []
    batch, length = min(settings.batch_sizes), max(settings.lengths)
    found = {
        s.source.name: parts(s.checkpoint.model, s.checkpoint.architecture, batch, length, settings.backend)
        for s in subjects
    }
    names = list(next(iter(found.values())))
    measurements = []
    for done, name in enumerate(names):
        progress(f"timing {name}, {length} x {batch} tokens", done, len(names))
        runs = {subject: runs[name] for subject, runs in found.items() if name in runs}
        timings = interleave(runs, device, settings.repeats, SHARE * settings.time_budget / len(names))
        dense, *others = timings
        ratios = {other: paired_ratio(timings[dense], timings[other]) for other in others}
        measurements.append(Measurement(KIND, length, batch, timings, ratios, part=name))
    return measurements


@torch.inference_mode()
def parts(model: nn.Module, architecture: Architecture, batch: int, length: int, backend: str) -> dict[str, Run]:
    """The parts of the first layer on (B, L) tokens in the order they run, and the head on the last of them.

    What a family does not have (Mamba-2 no x_proj, no dt_proj) is left out. `dt_proj` is the product alone, `conv1d`
    has its activation with it, `scan` its gate.
    """
    block = workloads.first_block(model, architecture)
    mixer = architecture.mixer(block)
    hidden = architecture.embed(model, workloads.random_tokens(model, batch, length))  # (B, L, d_model)
    normed = architecture.normed(block, hidden)
    x = architecture.expand(mixer, normed)[0]
    on_gpu = architecture.capabilities.gpu_scan and accelerator(backend, [x]) is not None

    def convolve() -> torch.Tensor:
        return architecture.convolve(mixer, x, fused=on_gpu)

    scan = workloads.scan(model, architecture, batch, length, backend)
    found: dict[str, Run] = {"in_proj": lambda: mixer.in_proj(normed), "conv1d": convolve}
    if hasattr(mixer, "x_proj"):
        u = convolve()
        low_rank = mixer.x_proj(u)[..., : mixer.time_step_rank]
        found["x_proj"] = lambda: mixer.x_proj(u)
        found["dt_proj"] = lambda: F.linear(low_rank, mixer.dt_proj.weight)
    found["scan"] = scan
    y = scan().to(normed.dtype)
    found["out_proj"] = lambda: mixer.out_proj(y)
    last = hidden[:, -1:]
    found["head"] = lambda: architecture.head(model, last)
    return {name: torch.inference_mode()(run) for name, run in found.items()}
