"""Tokens per second of decoding over batch sizes, 1, 2, 4, ..., as far as was asked for or memory reaches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import psutil
import torch

from ssmc.runtime.bench.results import Measurement
from ssmc.runtime.bench.settings import Settings
from ssmc.runtime.measure.sources import Subject
from ssmc.runtime.measure.timing import Timing, interleave
from ssmc.runtime.measure.workloads import decoding
from ssmc.runtime.models.generation.cuda_graphs import NotRecordable, record
from ssmc.runtime.progress import NO_PROGRESS, Progress

KIND = "throughput"
UNLIMITED = 2**20  # sequences; more than any memory holds
ROUNDS = 6
PART_OF_RAM = 0.5  # that states may take on a CPU: beyond it a system starts to swap or ends the process


def measure_throughput(
    subjects: Sequence[Subject], settings: Settings, device: torch.device, progress: Progress = NO_PROGRESS
) -> tuple[list[Measurement], list[str]]:
    """Sweep the batch sizes of decoding, one model after the other, alone on the device.

    Models are on the CPU before and after. On a GPU steps are replayed from CUDA graphs where they can be recorded.

    Returns:
        One measurement a batch size, without those models that ran out of memory before; and notes for the report.
    """
    if settings.max_batch < 1 or not subjects:
        return [], []
    found: dict[int, dict[str, Timing]] = {}
    notes: list[str] = []
    budget = settings.time_budget / 4 / len(subjects)
    for done, subject in enumerate(subjects):
        name = subject.source.name
        progress(f"tokens per second of {name}", done, len(subjects))
        subject.checkpoint.model.to(device)
        for batch, timing in _sweep(subject, settings, device, budget, notes):
            found.setdefault(batch, {})[name] = timing
        subject.checkpoint.model.cpu()
    return [Measurement(KIND, 1, batch, timings, {}) for batch, timings in sorted(found.items())], notes


def _sweep(
    subject: Subject, settings: Settings, device: torch.device, budget: float, notes: list[str]
) -> Iterator[tuple[int, Timing]]:
    """Batch sizes and seconds a step, until a batch does not fit."""
    name, batch = subject.source.name, 1
    while batch <= settings.max_batch:
        try:
            if device.type == "cpu" and not _fits(subject, batch):
                raise MemoryError
            timing = _time(subject, batch, device, budget, notes)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            notes.append(f"{name} decodes up to {batch // 2} sequences at once here; {batch} do not fit the memory.")
            break
        finally:
            if device.type == "cuda":
                torch.cuda.empty_cache()
        yield batch, timing
        batch *= 2


def _time(subject: Subject, batch: int, device: torch.device, budget: float, notes: list[str]) -> Timing:
    step = decoding(subject.checkpoint.model, batch, prompt=1)  # a longer prompt would need more memory than a step
    run = step.run
    if device.type == "cuda":
        try:
            run = record(step, device)
        except NotRecordable as why:
            sentence = f"Steps of {subject.source.name} ran without a CUDA graph: {why}."
            notes += [] if sentence in notes else [sentence]
    return interleave({"": run}, device, ROUNDS, budget / 20)[""]


def _fits(subject: Subject, batch: int) -> bool:
    state = batch * subject.checkpoint.dimensions.state_bytes()
    return state <= PART_OF_RAM * psutil.virtual_memory().available


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception says that there is no memory left: torch has a class for GPUs, and words for a CPU."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
    text = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in text for word in words)
