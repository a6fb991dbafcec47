"""Which models are compared: the dense one and every export of an artefact, or those the user names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

import torch

from ssmc.runtime.errors import CheckpointError, UsageError
from ssmc.runtime.manifest import EXPORTS, MANIFEST, RUNTIMES, ExportManifest, Manifest, read_manifest
from ssmc.runtime.models.checkpoints import Checkpoint, codes_format, load_checkpoint
from ssmc.runtime.models.checkpoints.packed_format import FILE as PACKED_FILE
from ssmc.runtime.models.checkpoints.reading import SINGLE_FILES, read_json
from ssmc.runtime.models.generation import OnnxExport, check_runtime, is_onnx_export, load_onnx_export
from ssmc.runtime.models.llama_cpp import GgufExport, check_llama_cpp, is_gguf_export, load_gguf_export
from ssmc.runtime.models.memory import ITEMSIZE, Footprint, sequence_memory
from ssmc.runtime.progress import NO_PROGRESS, Progress

RECIPE = ("pattern", "sparsity", "score", "repair")
"""What of a manifest's configuration a report repeats; the rest may name the user's paths."""


Measured: TypeAlias = Checkpoint | OnnxExport | GgufExport
"""A model of any runtime."""


@dataclass(frozen=True)
class Source:
    """A model to measure, not yet read."""

    name: str  # what reports call it; never an absolute path
    where: str  # what `load_checkpoint` or `load_onnx_export` takes
    dense: bool
    recipe: dict[str, Any] | None = None
    smaller: bool = False  # a plain smaller dense model, to compare with at equal speed


@dataclass(frozen=True)
class Subject:
    """A model to measure, read; `twins` are the same tensors in other formats, which need no timing of their own."""

    source: Source
    checkpoint: Measured
    twins: tuple[tuple[Source, Checkpoint], ...] = ()

    @property
    def runtime(self) -> str:
        """What computes it, "torch", "onnx" or "llama.cpp"."""
        return "torch" if isinstance(self.checkpoint, Checkpoint) else self.checkpoint.model.runtime

    @property
    def max_batch(self) -> int | None:
        """How many sequences it computes at once; None: any number."""
        return getattr(self.checkpoint.model, "max_batch", None)


def find_sources(
    directory: str | Path,
    dense: str | Path | None = None,
    models: Sequence[str | Path] | None = None,
    runtimes: Sequence[str] = RUNTIMES,
    smaller: Sequence[str | Path] = (),
) -> list[Source]:
    """The models of a comparison, the dense one first.

    Args:
        directory: an artefact of `compress` with exports in it, or one export; not read if `models` are given.
        dense: the model to compare with; by default the one the artefact was made from, or the first of `models`.
        models: explicit models to compare instead of an artefact's exports.
        runtimes: whose exports of an artefact are taken.
        smaller: plain dense models to compare with as well; they come last.

    Raises:
        UsageError: nothing to compare, or no such runtime.
        CheckpointError: the manifest does not say where the dense model is.
    """
    if wrong := [name for name in runtimes if name not in RUNTIMES]:
        raise UsageError(f"There is no runtime {', '.join(wrong)!r}; there are {' and '.join(RUNTIMES)}.")
    plain = [Source(label(where), str(where), dense=False, smaller=True) for where in smaller]
    if models is not None:
        named = [str(model) for model in ([] if dense is None else [dense]) + list(models)]
        if not named:
            raise UsageError("There is no model to measure. Name at least one.")
        sources = [Source(label(named[0]), named[0], dense=True)]
        sources += [Source(label(where), where, dense=False, recipe=_recipe_beside(where)) for where in named[1:]]
        return _distinct(sources + plain)
    directory = Path(directory).expanduser()
    manifest = read_manifest(directory)
    exports = _exports(directory, manifest, runtimes)
    if not exports:
        kind = "" if set(runtimes) == set(RUNTIMES) else f" for {' or '.join(runtimes)}"
        raise UsageError(f"{directory} holds no export{kind} to compare with the dense model. Run `ssmc export` first.")
    reference = dense_source(directory, manifest) if dense is None else Source(label(dense), str(dense), dense=True)
    return _distinct([reference, *exports, *plain])


def load_subjects(
    sources: Sequence[Source],
    dtype: torch.dtype | None,
    progress: Progress = NO_PROGRESS,
    device: str = "auto",
    all_logits: bool = False,
) -> list[Subject]:
    """Read all models; exports with the same tensors as one before them become its twins.

    Args:
        sources: the models.
        dtype: of torch's models.
        progress: told about every model.
        device: of ONNX exports; torch's models are read on the CPU.
        all_logits: open ONNX exports to score texts with them, see `load_onnx_export`.

    Raises:
        UsageError: onnxruntime is missing, or cannot use the device.
        CheckpointError: a model cannot be read, or was not made for the same vocabulary as the dense one.
    """
    subjects: list[Subject] = []
    for done, source in enumerate(sources):
        progress(f"reading {source.name}", done, len(sources))
        if is_onnx_export(source.where):
            subjects.append(Subject(source, load_onnx_export(source.where, device, all_logits)))
            continue
        if is_gguf_export(source.where):
            subjects.append(Subject(source, load_gguf_export(source.where)))
            continue
        checkpoint = _load(source, dtype)
        for position, other in enumerate(subjects):
            if not source.dense and not other.source.dense and _same_model(other.checkpoint, checkpoint):
                subjects[position] = Subject(other.source, other.checkpoint, (*other.twins, (source, checkpoint)))
                break
        else:
            subjects.append(Subject(source, checkpoint))
    vocabularies = {subject.source.name: subject.checkpoint.dimensions.vocab_size for subject in subjects}
    if len(set(vocabularies.values())) > 1:
        sizes = ", ".join(f"{name}: {size}" for name, size in vocabularies.items())
        raise CheckpointError(f"These models have different vocabularies ({sizes}), so they cannot be compared.")
    return subjects


def label(where: str | Path) -> str:
    """What to call a model in a report: as the user typed it, but of an absolute path only the last part."""
    path = Path(where).expanduser()
    if path.is_absolute() or str(where).startswith("~"):
        return path.name
    if str(where) in (".", "..") or str(where).startswith("../"):
        return path.resolve().name
    return str(PurePosixPath(str(where)))


def runnable(sources: Sequence[Source], device: torch.device) -> tuple[list[Source], list[str]]:
    """Those of the sources that can be run on a device, and notes on exports that cannot.

    Raises:
        UsageError: one that cannot is the dense model, or nothing is left beside it.
    """
    left, notes = list(sources), []
    needs = (
        (is_onnx_export, check_runtime),
        (is_gguf_export, check_llama_cpp),
        (codes_format.is_packed, codes_format.check_package),
    )
    for is_export, check in needs:
        exports = [source for source in left if is_export(source.where)]
        try:
            if exports:
                check(device.type)
        except UsageError as error:
            rest = [source for source in left if source not in exports]
            if len(rest) < 2 or exports[0].dense:
                raise
            left = rest
            notes.append(f"{', '.join(source.name for source in exports)} was left out: {error}")
    return left, notes


def weight_bytes(checkpoint: Measured) -> int:
    """Bytes on disk of the weights that a model was read from."""
    if not isinstance(checkpoint, Checkpoint):
        return checkpoint.weight_bytes
    directory = checkpoint.directory
    for single in (*SINGLE_FILES, PACKED_FILE):
        index = directory / f"{single}.index.json"
        if (directory / single).is_file():
            return (directory / single).stat().st_size
        if index.is_file():
            shards = set(read_json(index)["weight_map"].values())
            return sum((directory / shard).stat().st_size for shard in shards)
    raise ValueError(f"{directory} was loaded, so it has weights")


def state_bytes(checkpoint: Measured) -> int:
    """Bytes of recurrent state one sequence occupies, in float32 for torch's models."""
    return checkpoint.dimensions.state_bytes() if isinstance(checkpoint, Checkpoint) else checkpoint.state_bytes


def footprint(subject: Subject, length: int, state_dtype: str = "float32") -> Footprint | None:
    """A model in memory as it computes, with sequences of so many tokens; None where the runtime does not say."""
    checkpoint = subject.checkpoint
    if not isinstance(checkpoint, Checkpoint):
        return checkpoint.footprint(length)
    dtype, architecture = compute_dtype(subject), checkpoint.architecture
    kept = architecture.kept_per_token(checkpoint.config)
    weights = checkpoint.parameters * ITEMSIZE[dtype]
    return Footprint(weights, sequence_memory(checkpoint.dimensions, kept, length, dtype, state_dtype))


def stored_dtype(checkpoint: Measured) -> str:
    """Of the weights on disk; "mixed" if they have several, "codes" where they are packed."""
    if not isinstance(checkpoint, Checkpoint):
        return checkpoint.stored_dtype
    if checkpoint.format == codes_format.NAME:
        return "codes"
    names = {str(dtype).removeprefix("torch.") for dtype in checkpoint.dtypes.values()}
    return names.pop() if len(names) == 1 else "mixed"


def compute_dtype(subject: Subject) -> str:
    """What a model computes in; a graph computes in float32 what is not a matrix product."""
    return "float32" if subject.runtime != "torch" else str(subject.checkpoint.model.dtype).removeprefix("torch.")


def dtypes_note(subjects: Sequence[Subject]) -> list[str]:
    """What to say where models compute in different dtypes, as on a GPU they may unless the user names one."""
    dtypes = {subject.source.name: compute_dtype(subject) for subject in subjects}
    if len(set(dtypes.values())) == 1:
        return []
    each = ", ".join(f"{name} in {dtype}" for name, dtype in dtypes.items())
    return [f"The models compute in different dtypes ({each}), which alone changes their speed; --dtype makes it one."]


def is_sparse24(directory: Path) -> bool:
    """Whether a model directory is an export as sparse24, whose manifest lists its 2:4 modules."""
    return (directory / MANIFEST).is_file() and _is_sparse24(read_manifest(directory))


def _is_sparse24(manifest: Manifest) -> bool:
    return isinstance(manifest, ExportManifest) and "sparse24" in manifest.about


def _exports(directory: Path, manifest: Manifest, runtimes: Sequence[str]) -> list[Source]:
    if isinstance(manifest, ExportManifest):  # the user named one export
        return [Source(label(directory), str(directory), dense=False, recipe=_recipe(manifest))]
    found = []
    for name in [name for runtime in RUNTIMES if runtime in runtimes for name in EXPORTS[runtime]]:
        if (directory / name / MANIFEST).is_file():
            recipe = _recipe(read_manifest(directory / name))
            found.append(Source(f"{label(directory)}/{name}", str(directory / name), dense=False, recipe=recipe))
    return found


def _recipe_beside(where: str) -> dict[str, Any] | None:
    """How a named model was compressed, where a manifest lies with it."""
    path = Path(where).expanduser()
    return _recipe(read_manifest(path)) if (path / MANIFEST).is_file() else None


def _recipe(manifest: Manifest) -> dict[str, Any] | None:
    config = manifest.config or {}
    return {key: config[key] for key in RECIPE if key in config} or None


def dense_source(directory: Path, manifest: Manifest) -> Source:
    """Where the dense model is: seen from the artefact if it still stands there, else as it was named."""
    named, relative = manifest.source.model, manifest.source.relative
    if not named:
        raise CheckpointError(
            f"The manifest in {directory} does not say which model it was made from. Name the dense model with --dense."
        )
    # an export repeats the path of the artefact it lies in, which starts one folder higher
    above = directory.parent if isinstance(manifest, ExportManifest) else directory
    where = above / relative if relative and (above / relative).exists() else named
    return Source(label(named), str(where), dense=True)


def _load(source: Source, dtype: torch.dtype | None) -> Checkpoint:
    try:
        return load_checkpoint(source.where, dtype=dtype, codes=True)
    except CheckpointError as error:
        if not source.dense:
            raise
        raise CheckpointError(
            f"The dense model to compare with cannot be read: {error} It can be named with --dense."
        ) from error


def _same_model(one: Measured, other: Checkpoint) -> bool:
    if not isinstance(one, Checkpoint):
        return False
    ours, theirs = one.tensors(), other.tensors()
    return ours.keys() == theirs.keys() and all(
        tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]) for name, tensor in ours.items()
    )


def _distinct(sources: list[Source]) -> list[Source]:
    """Number the later ones of equal names."""
    seen: dict[str, int] = {}
    named = []
    for source in sources:
        seen[source.name] = count = seen.get(source.name, 0) + 1
        name = source.name if count == 1 else f"{source.name} ({count})"
        named.append(replace(source, name=name))
    return named
