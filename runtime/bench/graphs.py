"""Decoding from CUDA graphs beside decoding launched from Python: at small batches, launching takes longer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ssmc.runtime.bench.results import Measurement
from ssmc.runtime.bench.settings import Settings
from ssmc.runtime.measure.sources import Subject
from ssmc.runtime.measure.timing import interleave, paired_ratio
from ssmc.runtime.measure.workloads import decoding
from ssmc.runtime.models.generation.cuda_graphs import NotRecordable, record
from ssmc.runtime.progress import NO_PROGRESS, Progress

KIND = "graph"


def measure_graphs(
    subjects: Sequence[Subject], settings: Settings, device: torch.device, progress: Progress = NO_PROGRESS
) -> tuple[list[Measurement], list[str]]:
    """Time decoding from CUDA graphs at every batch size; on a CPU there is nothing to time.

    Returns:
        Measurements, and a note where a model's step cannot be recorded.
    """
    if device.type != "cuda" or not subjects:
        return [], []
    measurements = []
    for done, batch in enumerate(settings.batch_sizes):
        progress(f"timing decode from a CUDA graph, batch {batch}", done, len(settings.batch_sizes))
        runs = {}
        for subject in subjects:
            try:
                runs[subject.source.name] = record(decoding(subject.checkpoint.model, batch), device)
            except NotRecordable as why:
                return measurements, [f"Decoding of {subject.source.name} was not timed from a CUDA graph: {why}."]
        budget = settings.time_budget / 10 / len(settings.batch_sizes)
        timings = interleave(runs, device, settings.repeats, budget, calls=settings.decode_tokens)
        dense, *others = timings
        ratios = {other: paired_ratio(timings[dense], timings[other]) for other in others}
        measurements.append(Measurement(KIND, 1, batch, timings, ratios))
    return measurements, []
