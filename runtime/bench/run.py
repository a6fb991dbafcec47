"""`benchmark`: the dense model beside the compressed ones, everything measured in one go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

from ssmc.runtime.bench.graphs import measure_graphs
from ssmc.runtime.bench.parts import measure_parts
from ssmc.runtime.bench.report import Report
from ssmc.runtime.bench.results import Model, WeightFiles
from ssmc.runtime.bench.settings import Settings
from ssmc.runtime.bench.speed import measure_speed
from ssmc.runtime.bench.throughput import UNLIMITED, measure_throughput
from ssmc.runtime.device import choose_device, choose_dtype
from ssmc.runtime.manifest import RUNTIMES
from ssmc.runtime.measure.conditions import Conditions, busy_note, conditions, load_average
from ssmc.runtime.measure.memory import Memory, MemoryProcessError, MemoryTask, measure_memory
from ssmc.runtime.measure.perplexity import Perplexity, excess_loss, summarise
from ssmc.runtime.measure.quality import read_tokens, require_same_tokens, score_tokens, shortened_note
from ssmc.runtime.measure.recall import KindLoss, recall_of
from ssmc.runtime.measure.sources import (
    Subject,
    compute_dtype,
    dtypes_note,
    find_sources,
    footprint,
    is_sparse24,
    load_subjects,
    runnable,
    state_bytes,
    stored_dtype,
    weight_bytes,
)
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.progress import NO_PROGRESS, Progress
from ssmc.runtime.sparse24 import Sparse24Report, use_sparse24


def benchmark(
    directory: str | Path = "ssmc-out",
    *,
    dense: str | Path | None = None,
    models: Sequence[str | Path] | None = None,
    smaller: Sequence[str | Path] | None = None,
    lengths: Sequence[int] = (128, 512, 2048),
    batch_sizes: Sequence[int] = (1, 8),
    decode_tokens: int = 32,
    repeats: int = 15,
    time_budget: float = 90.0,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    text: str | Path | None = None,
    tokenizer: str | None = None,
    window: int = 1024,
    max_windows: int | None = 32,
    stock: bool = True,
    backend: str = "auto",
    state_dtype: str = "float32",
    max_batch: int | None = None,
    runtimes: Sequence[str] = RUNTIMES,
    progress: Progress = NO_PROGRESS,
) -> Report:
    """Measure the dense model beside the compressed ones: sizes, memory, speed, perplexity.

    Args:
        directory: what `compress` wrote, with exports in it, or one export.
        dense: the model to compare with; by default the one the artefact was made from.
        models: models to compare instead of the artefact's exports; without `dense`, the first is the reference.
        smaller: plain smaller dense models of the same tokens, to compare with at equal speed.
        lengths: tokens of the prefills.
        batch_sizes: sequences at once, in decoding and prefill; see `workloads.grid`.
        decode_tokens: steps one decoding sample is the mean of.
        repeats: rounds of every timing at most.
        time_budget: seconds to spend on timing, a guide: no workload gets fewer than `timing.MIN_ROUNDS` rounds.
        device: "cpu", "cuda" or "auto".
        dtype: of weights and activations; by default float32 on a CPU and the stored one on a GPU.
        text: held-out text for perplexity, as in `read_texts`; by default the sample that comes with `tiny`.
        tokenizer: directory or hub id, where the dense model carries none.
        window: tokens per window of perplexity.
        max_windows: windows scored at most, from the start of the text; None scores all.
        stock: also time the dense model with transformers' own loop, for context.
        backend: of the selective scan, see `use_fast_scan`.
        state_dtype: how torch's models but the dense one keep SSM states between tokens, "float32", "float16" or
            "int8"; for the perplexity they are rounded after every token, as if each had been written.
        max_batch: also decode 1, 2, 4, ... sequences at once up to this many, each model alone, or until memory is
            full; 0 leaves that out, None does it on a GPU only, without a limit.
        runtimes: of "torch", "onnx" and "llama.cpp", those whose exports of an artefact are measured.
        progress: told what is being done.

    Raises:
        SsmcError: with one sentence on what is wrong and what to do.
    """
    where = choose_device(device)
    if max_batch is None:
        max_batch = UNLIMITED if where.type == "cuda" else 0
    settings = Settings(
        tuple(lengths),
        tuple(batch_sizes),
        decode_tokens,
        repeats,
        time_budget,
        window,
        max_windows,
        backend,
        max_batch,
        state_dtype,
    )
    sources, left_out = runnable(find_sources(directory, dense, models, runtimes, smaller or ()), where)
    subjects = load_subjects(sources, choose_dtype(dtype, where), progress, device=where.type)
    in_torch = [subject for subject in subjects if subject.runtime == "torch"]
    checkpoints = [subject.checkpoint for subject in subjects]
    tokens, text_info, notes = read_tokens(checkpoints, text, tokenizer, (window, max_windows))
    require_same_tokens(subjects, tokenizer)
    load_before = load_average()
    notes += left_out + busy_note(load_before) + dtypes_note(subjects)
    memory = [_memory(subject, settings, where, notes, progress) for subject in subjects]
    parameters = [checkpoint.parameters for checkpoint in checkpoints]
    for subject in in_torch:
        use_fast_scan(subject.checkpoint.model, backend, settings.state_dtype_of(subject.source.dense))
    throughput, more = measure_throughput(in_torch, settings, where, progress)
    notes += more
    for subject in in_torch:
        subject.checkpoint.model.to(where)
    sparse = [_run_sparse(subject, settings, notes, progress) for subject in subjects]
    measurements = measure_speed(subjects, settings, where, stock, progress)
    measurements += measure_parts(in_torch, settings, where, progress)
    graphs, more = measure_graphs(in_torch, settings, where, progress)
    notes += more
    for subject in in_torch:
        if (kept := settings.state_dtype_of(subject.source.dense)) != "float32":
            use_fast_scan(subject.checkpoint.model, backend, kept, each_token=True)
    losses = [] if tokens is None else [score_tokens(subject, tokens, window, progress) for subject in subjects]
    scores = [summarise(*found) for found in losses] or [None for _ in subjects]
    recall = recall_of(losses, [subject.source.dense for subject in subjects]) or [() for _ in subjects]
    if scores[0] is not None:
        notes += shortened_note(scores[0], window)
    rows = zip(subjects, parameters, memory, sparse, zip(scores, recall, strict=True), strict=True)
    return Report(
        # read after the work: numba's first parallel loop can change how many threads torch has
        conditions=_conditions(subjects, where, load_before),
        settings=settings,
        text=text_info,
        models=tuple(_model(*row, scores[0], settings) for row in rows),
        measurements=(*measurements, *graphs, *throughput),
        notes=tuple(notes),
        load_average_after=load_average(),
    )


def _conditions(
    subjects: Sequence[Subject], where: torch.device, load_before: tuple[float, float, float] | None
) -> Conditions:
    """The conditions of now, with the versions of what else computed."""
    found = conditions(where, getattr(torch, compute_dtype(subjects[0])), load_before)
    if all(subject.runtime == "torch" for subject in subjects):
        return found
    used = {"onnx": "onnxruntime", "llama.cpp": "xllamacpp"}
    packages = [package for name, package in used.items() if any(subject.runtime == name for subject in subjects)]
    return replace(found, versions=found.versions | {package: version(package) for package in packages})


def _run_sparse(subject: Subject, settings: Settings, notes: list[str], progress: Progress) -> Sparse24Report | None:
    """Run an export as sparse24 on sparse tensor cores where that is faster at the longest prefill."""
    if subject.runtime != "torch" or not is_sparse24(subject.checkpoint.directory):
        return None
    batch, length = min(settings.batch_sizes), max(settings.lengths)
    report = use_sparse24(subject.checkpoint.model, batch, length, progress=progress)
    if report.reason:
        notes.append(f"{subject.source.name}: {report.reason}")
    return report


def _memory(
    subject: Subject, settings: Settings, device: torch.device, notes: list[str], progress: Progress
) -> Memory | None:
    progress(f"memory of {subject.source.name}", 0, 1)
    if subject.runtime == "onnx" and device.type == "cuda":
        notes.append(f"The GPU memory of {subject.source.name} was not measured: torch does not see onnxruntime's.")
        return None
    task = MemoryTask(
        source=subject.source.where,
        device=device.type,
        dtype=compute_dtype(subject),
        length=max(settings.lengths),
        prefill_batch=min(settings.batch_sizes),
        decode_batch=max(settings.batch_sizes),
        backend=settings.backend,
        state_dtype=settings.state_dtype_of(subject.source.dense),
    )
    try:
        return measure_memory(task)
    except MemoryProcessError as error:
        notes.append(f"The peak memory of {subject.source.name} could not be measured: {error}.")
        return None


def _state_bytes(subject: Subject, settings: Settings) -> int:
    """Bytes of recurrent state of a sequence, as it is kept between tokens."""
    kept = footprint(subject, 1, settings.state_dtype_of(subject.source.dense))
    known = settings.state_dtype != "float32" and subject.runtime == "torch" and kept is not None
    return kept.sequence.states + kept.sequence.windows if known else state_bytes(subject.checkpoint)


def _model(
    subject: Subject,
    parameters: int,
    memory: Memory | None,
    sparse24: Sparse24Report | None,
    quality: tuple[Perplexity | None, tuple[KindLoss, ...]],
    dense: Perplexity | None,
    settings: Settings,
) -> Model:
    checkpoint = subject.checkpoint
    everyone = ((subject.source, checkpoint), *subject.twins)
    score, recall = quality
    return Model(
        name=subject.source.name,
        dense=subject.source.dense,
        recipe=subject.source.recipe,
        runtime=subject.runtime,
        stored_dtype=stored_dtype(checkpoint),
        dimensions=checkpoint.dimensions,
        parameters=parameters,
        files=tuple(WeightFiles(s.name, c.format, weight_bytes(c)) for s, c in everyone),
        state_bytes=_state_bytes(subject, settings),
        footprint=footprint(subject, max(settings.lengths), settings.state_dtype_of(subject.source.dense)),
        memory=memory,
        perplexity=score,
        excess=None if score is None or dense is None or subject.source.dense else excess_loss(score, dense),
        smaller=subject.source.smaller,
        sparse24=sparse24,
        recall=recall,
    )
