"""The proof that a written file is the model: llama.cpp runs it, or its tensors are read back."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssmc.exporters.format import Job
from ssmc.exporters.gguf.codes import CODES, OFF, blocks, with_scales
from ssmc.exporters.gguf.layouts import adapt
from ssmc.exporters.gguf.prepare import write
from ssmc.exporters.gguf.write import BLOCK, FILE, open_tensors, type_of
from ssmc.exporters.quality import Quality, quality_of
from ssmc.exporters.verify import Comparison, Way, cut_epsilons, expected
from ssmc.runtime.errors import CheckpointError, VerificationError
from ssmc.runtime.measure.perplexity import split_windows
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.models.llama_cpp.client import PACKAGE, LlamaCpp, is_installed

STEPPED = 32  # tokens read at once before the others are read one by one
WINDOW, WINDOWS = 256, 4  # of the perplexity
ROUNDED = {"f32": 0.0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 127, "q5_1": 1 / 15, "q4_0": 1 / 7}
"""How far a stored number may be off, relative to the largest of its block."""

_FLOAT = ".float32"  # folder of the file that is proven, gone before the result appears


@dataclass(frozen=True)
class FileDetails:
    """What was found out.

    Attributes:
        run_by: what ran the file, None where it was only read back.
        ways: the ways it was run.
        rounding: how far a quantised file's log probabilities are from the model's; None for a float32 one.
        quality: perplexity before and after quantisation; None for a float32 file, and where nothing was run.
        adapted: how llama.cpp's arithmetic differs from the model's; None where it does not.
        moved: by how much that moves a logit.
    """

    run_by: str | None
    ways: tuple[Way, ...] = ()
    rounding: float | None = None
    quality: Quality | None = None
    adapted: str | None = None
    moved: float = 0.0


def prove_written(job: Job, folder: Path) -> tuple[Comparison, FileDetails]:
    """Prove the file in a folder.

    Raises:
        VerificationError: it is not the model, or llama.cpp cannot run it.
    """
    compare_tensors(job, folder / FILE)
    if not is_installed():
        return Comparison(0.0, 0.0, 0.0, 0, False), FileDetails(None)
    checkpoint, tokens = job.source.checkpoint, job.tokens
    epsilon = cut_epsilons(checkpoint, job.shrunk.config, tokens.sample)
    adapted, moved = _adapted(job)
    reference, tolerance = expected(checkpoint.model, tokens.sample)
    reference = reference.double().log_softmax(dim=-1).numpy()
    details = FileDetails(f"llama.cpp ({PACKAGE} {version(PACKAGE)})", adapted=adapted, moved=moved)
    try:
        if job.options.lossy:
            (folder / _FLOAT).mkdir()
            ways = _ways(write(job, folder / _FLOAT, "f32"), tokens.sample, reference)
            rounding = max(way.max_difference for way in _ways(folder / FILE, tokens.sample, reference))
            details = replace(details, rounding=rounding, quality=_quality(job, folder / FILE))
        else:
            ways = _ways(folder / FILE, tokens.sample, reference)
    except CheckpointError as error:
        raise VerificationError(f"{error} Nothing was written.") from error
    finally:
        shutil.rmtree(folder / _FLOAT, ignore_errors=True)
    worst, scale = max(way.max_difference for way in ways), float(np.abs(reference).max())
    if not worst <= tolerance:
        raise VerificationError(
            f"llama.cpp's log probabilities differ from the model's by {worst:.3g} (allowed {tolerance:.3g}), so "
            "nothing was written. This is a bug in ssmc; please report it with the model's sizes."
        )
    comparison = Comparison(worst, tolerance, scale, tokens.sample.numel(), tokens.real, epsilon)
    return comparison, replace(details, ways=tuple(ways))


@torch.no_grad()
def _adapted(job: Job) -> tuple[str | None, float]:
    """Make the model compute as llama.cpp does; how they differ, and how far that moves a logit."""
    model, tokens = job.source.checkpoint.model, job.tokens.sample
    before = use_fast_scan(model)(tokens).logits
    how = adapt(job.extra.layout, model)
    return how, 0.0 if how is None else float((model(tokens).logits - before).abs().max())


def compare_tensors(job: Job, path: Path) -> None:
    """Read a file back and compare every tensor with the one it was made from.

    Raises:
        VerificationError: one is missing, too many, or off by more than its type explains.
    """
    stored = open_tensors(path)
    prepared, shrunk = job.extra, job.shrunk
    for entry, scale in with_scales(prepared.layout, shrunk.config, prepared.sizes, shrunk.tensors, prepared.codes):
        read = stored.pop(entry.name, None)
        wanted, found = entry.tensor.detach().to("cpu", torch.float32).numpy(), None if read is None else read()
        coded = scale is not None and blocks(entry.tensor, scale) is not None
        kind = CODES if coded else type_of(entry, job.options.quantize)
        if found is None or found.shape != wanted.shape or not _close(found, wanted, kind):
            raise VerificationError(f"{entry.name} is not in the file as it was given, so nothing was written.")
    if stored:
        raise VerificationError(f"The file holds {', '.join(sorted(stored)[:3])}, which nobody wrote.")


def _close(found: np.ndarray, wanted: np.ndarray, kind: str) -> bool:
    """Whether stored numbers are what they were, but for the rounding of their type."""
    if kind in ("f32", "f16", "bf16"):
        return bool((np.abs(found - wanted) <= ROUNDED[kind] * np.abs(wanted) + 1e-7 * (kind == "f16")).all())
    if kind == CODES:
        return bool((np.abs(found - wanted) <= OFF * np.abs(wanted)).all())
    largest = np.abs(wanted).reshape(*wanted.shape[:-1], -1, BLOCK).max(axis=-1)
    return bool((np.abs(found - wanted) <= ROUNDED[kind] * np.repeat(largest, BLOCK, axis=-1) + 1e-6).all())


def _ways(path: Path, sample: torch.Tensor, reference: np.ndarray) -> list[Way]:
    """Run a file on (B, L) tokens and compare with log probabilities (B, L, V): whole prompts, and token by token."""
    whole, stepped = [], []
    with LlamaCpp(path, context=sample.shape[1] + 8) as llama:
        for row, wanted in zip(sample.tolist(), reference, strict=True):
            for length in (1, STEPPED // 2, STEPPED, len(row)):
                found = llama.log_probs(row[:length], wanted.shape[-1])
                whole.append(float(np.abs(found - wanted[length - 1]).max()))
            values, _ = llama.score(row, STEPPED)
            right = wanted[np.arange(STEPPED - 1, len(row) - 1), row[STEPPED:]]
            stepped.append(float(np.abs(np.array(values) - right).max()))
    ways = (("whole prompts", whole), (f"{sample.shape[1] - STEPPED} decode steps", stepped))
    return [Way(name, worst if math.isfinite(worst := max(values)) else math.inf) for name, values in ways]


def _quality(job: Job, path: Path) -> Quality:
    """Perplexity before and after quantisation."""
    model: Any = job.source.checkpoint.model
    windows = split_windows(model, job.tokens.stream, WINDOW)[:WINDOWS]
    before, after = [], []
    with LlamaCpp(path, context=windows.shape[1] + 8) as llama:
        for done, window in enumerate(windows):
            job.progress("perplexity before and after", done, len(windows))
            with torch.inference_mode():
                logits = model(window[None], use_cache=False).logits[0, :-1].double()
            before.append(float(-logits.log_softmax(-1).gather(1, window[1:, None]).mean()))
            after.append(float(-np.mean(llama.score(window.tolist())[0])))
    return quality_of(job.tokens.source, windows, before, after)
