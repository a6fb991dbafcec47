"""Distillation of checkpoints: the text they read, the dense model that teaches, and artefacts that are taught on."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ssmc.compressor.artefact import write_masked
from ssmc.compressor.distillation.narrowed import Left
from ssmc.compressor.distillation.state import StateFile, fingerprint
from ssmc.compressor.distillation.steps import (
    HELD_OUT,
    WINDOW,
    Course,
    Distillation,
    Pair,
    distill,
    sequences_of,
)
from ssmc.compressor.options.recipe import RECIPE
from ssmc.runtime.collectives import from_first, joined
from ssmc.runtime.device import choose_device
from ssmc.runtime.errors import CalibrationError, UsageError
from ssmc.runtime.files import refuse_existing
from ssmc.runtime.manifest import MANIFEST, MaskedManifest, read_compressed
from ssmc.runtime.measure.sources import dense_source
from ssmc.runtime.models.checkpoints import Checkpoint, load_checkpoint
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.models.tokenizers import load_tokenizer, tokenizer_directory
from ssmc.runtime.progress import NO_PROGRESS, Progress
from ssmc.runtime.ranks import is_first, ranks
from ssmc.runtime.text import draw_windows
from ssmc.runtime.tiny import calibration_path
from ssmc.runtime.versions import versions


@dataclass(frozen=True)
class Lesson:
    """What a distillation is told.

    Attributes:
        steps: gradient steps, at most.
        calib: the text, as in `read_texts`; None: the stories that come with `tiny`.
        window: tokens of a sequence, at most.
        seed: of the draw of sequences and of their order.
        tokenizer: folder or hub id; None: the one beside the model.
        device: "auto", "cpu" or "cuda".
    """

    steps: int
    calib: str | None = None
    window: int = WINDOW
    seed: int = 0
    tokenizer: str | None = None
    device: str = "auto"


@dataclass(frozen=True)
class DistilResult:
    """What `distil_artefact` wrote."""

    directory: Path
    manifest: dict[str, Any]
    distillation: Distillation


def distil_checkpoint(
    student: Checkpoint,
    dense: str,
    lesson: Lesson,
    progress: Progress = NO_PROGRESS,
    *,
    layers: Sequence[Left] = (),
    state: StateFile | None = None,
) -> Distillation:
    """Distil a masked model in place.

    Args:
        student: in float32, of the dense model's shape.
        dense: the dense model, as `load_checkpoint` takes it.
        lesson: what to do.
        progress: told about steps.
        layers: what is left of each layer, so that the rest is not computed; none where that is not known.
        state: keeps how far it came, and may hold what an interrupted run left; the caller removes it when the result
            is written.

    Raises:
        CalibrationError: the text does not suffice.
        CheckpointError: the dense model cannot be read.
        UsageError: the state is that of another run.
    """
    source = calibration_path() if lesson.calib is None else lesson.calib
    window = min(lesson.window, WINDOW)
    count = (lesson.steps + HELD_OUT) * sequences_of(window)
    tokenizer = load_tokenizer(student, lesson.tokenizer)
    tokens = draw_windows(source, tokenizer, count, window, lesson.seed).tokens
    if len(tokens) < 2:
        raise CalibrationError(
            f"Distillation needs at least two sequences of {window} tokens, {source} holds "
            f"{len(tokens)}. Give more text with --calib, or use a smaller --seqlen."
        )
    course = Course(lesson.steps, lesson.seed, layers)
    if state is not None:
        told = (lesson.steps, lesson.seed, layers, versions(), ranks())
        run = fingerprint([tokens, *student.model.state_dict().values()], told)
        course = replace(course, start=state.load(run), keep=partial(state.save, run) if is_first() else None)
    teacher = load_checkpoint(dense, dtype=torch.float32)
    pair = Pair(student.architecture, use_fast_scan(student.model), use_fast_scan(teacher.model))
    pair.to(choose_device(lesson.device))
    done = distill(pair, tokens, course, progress)
    pair.to(torch.device("cpu"))
    return done


def distil_artefact(
    directory: str | Path,
    lesson: Lesson,
    *,
    out: str | Path | None = None,
    force: bool = False,
    resume: bool = False,
    command: str | None = None,
    progress: Progress = NO_PROGRESS,
) -> DistilResult:
    """Distil what `compress` wrote, and write it anew; of several processes, which share each step, the first writes.

    Args:
        directory: what `compress` wrote.
        lesson: what to do.
        out: folder to write; by default DIRECTORY-distilled. With `force` it may be `directory` itself.
        force: replace an earlier result of ssmc.
        resume: go on with a run of the same lesson that was interrupted.
        command: recorded in the manifest.
        progress: told about steps.

    Raises:
        UsageError: `directory` is not what `compress` wrote, there are no steps to take, or there is nothing to resume.
    """
    if lesson.steps < 1:
        raise UsageError(f"Distillation needs at least one step, not {lesson.steps}.")
    directory = Path(directory).expanduser()
    manifest = read_compressed(directory)
    if manifest.quantized is not None:
        raise UsageError(
            f"The weights in {directory} are codes of {manifest.quantized['bits']} bits, which gradient steps would "
            "leave. Compress without --quantize, or with --refine, which comes before it."
        )
    place = directory.with_name(f"{directory.name}-distilled") if out is None else Path(out).expanduser()
    state = StateFile.beside(place, resume)
    if is_first():
        refuse_existing(place, force=force, marker=MANIFEST)
        state.check()
    progress("reading the model", 0, 1)
    student = load_checkpoint(directory, dtype=torch.float32)
    layers = [Left(layer.kept, layer.kept_channels) for layer in manifest.layers]
    dense = dense_source(directory, manifest).where
    with joined(choose_device(lesson.device)):
        done = distil_checkpoint(student, dense, lesson, progress, layers=layers, state=state)
        content: dict[str, Any] = {}
        if is_first():
            written = _continued(manifest, done, command, directory, place)
            recipe = directory / RECIPE if (directory / RECIPE).is_file() else None
            content = write_masked(place, student, tokenizer_directory(student), written, recipe, force=force)
            state.remove()
        return DistilResult(place, from_first(content), done)


def _continued(
    manifest: MaskedManifest, done: Distillation, command: str | None, directory: Path, place: Path
) -> MaskedManifest:
    """The manifest with what was done since; the dense model as it is seen from the new folder."""
    relative = manifest.source.relative
    if relative is not None:
        relative = os.path.relpath(directory / relative, place)
    distilled: Mapping[str, Any] = asdict(done)
    source = replace(manifest.source, relative=relative)
    return replace(manifest, source=source, distilled=distilled, command=command)
