"""Decoding steps as CUDA graphs: at small batches, launching the kernels of a step takes longer than running them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ssmc.runtime.bench.report import Measurement
from ssmc.runtime.bench.settings import Settings
from ssmc.runtime.bench.sources import Subject
from ssmc.runtime.measure.timing import interleave, paired_ratio
from ssmc.runtime.measure.workloads import Decoding, decoding
from ssmc.runtime.progress import Progress, silent
from ssmc.runtime.sparse24.cuda import first_line

KIND = "graph"
WARM_UPS = 3
TOLERANCE = 1e-2  # of the largest logit: a recorded step runs the same kernels


class NotRecordable(Exception):  # noqa: N818 (a finding for the report, nobody's mistake)
    """Why a step cannot be recorded, in a few words."""


def measure_graphs(
    subjects: Sequence[Subject], settings: Settings, device: torch.device, progress: Progress = silent
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


@torch.inference_mode()
def record(step: Decoding, device: torch.device) -> Callable[[], torch.Tensor]:
    """A callable that replays `step` from a CUDA graph.

    Tokens and states keep their places in memory, as a graph needs it, so each replay continues the sequences as the
    step itself does; that is checked before it is handed out.

    Raises:
        NotRecordable: there is no CUDA device, or the step does something a graph cannot hold.
    """
    if not states_stay(step):
        raise NotRecordable("the states move in memory from step to step")
    if device.type != "cuda":
        raise NotRecordable("CUDA graphs need a CUDA device")
    try:
        replay = capture(step.run, device)
        difference = _difference(step, replay)
    except RuntimeError as error:
        raise NotRecordable(first_line(error)) from error
    if not difference <= TOLERANCE:
        raise NotRecordable(f"replayed, it gives other logits (relative difference {difference:.2g})")
    return replay


@torch.inference_mode()
def states_stay(step: Decoding) -> bool:
    """Whether a step leaves every state where it is in memory and changes it there."""
    before = [state.data_ptr() for state in step.states()]
    values = [state.clone() for state in step.states()]
    step.run()
    after = step.states()
    changed = any(not torch.equal(value, state) for value, state in zip(values, after, strict=True))
    return changed and before == [state.data_ptr() for state in after]


def capture(run: Callable[[], torch.Tensor], device: torch.device) -> Callable[[], torch.Tensor]:
    """Record one call as a CUDA graph, after a few on a stream of their own so that everything is allocated and chosen.

    Raises:
        RuntimeError: it does something a graph cannot hold.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()

    def replay() -> torch.Tensor:
        graph.replay()
        return output

    return replay


def _difference(step: Decoding, replay: Callable[[], torch.Tensor]) -> float:
    """Largest difference of a logit between a step and its replay from the same states, relative to the largest."""
    states = step.states()
    before = [state.clone() for state in states]
    wanted = step.run().float().clone()
    for state, value in zip(states, before, strict=True):
        state.copy_(value)
    got = replay().float()
    return float((got - wanted).abs().max() / wanted.abs().max())
