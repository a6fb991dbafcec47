"""Which models are evaluated: those the user names, or the dense model of an artefact and what was made of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ssmc.runtime.manifest import EXPORTS, MANIFEST, RUNTIMES, ExportManifest, read_manifest
from ssmc.runtime.measure.sources import Source, dense_source, find_sources

DEFAULT_DIRECTORY = "ssmc-out"


def artefact_directory(models: Sequence[str | Path]) -> Path | None:
    """The artefact that stands for its dense model and its exports: the only model named, or the default folder."""
    if not models:
        return Path(DEFAULT_DIRECTORY)
    only = Path(models[0]).expanduser()
    return only if len(models) == 1 and (only / MANIFEST).is_file() else None


def choose_sources(
    models: Sequence[str | Path], dense: str | Path | None = None, runtimes: Sequence[str] = RUNTIMES
) -> list[Source]:
    """The models of an evaluation, the reference first.

    Args:
        models: models, of which the first is the reference unless `dense` is named; or one folder that `compress` or
            `export` wrote, which stands for its dense model and its exports, or for its dense model and itself where
            it has none; or nothing, which stands for ssmc-out.
        dense: the reference.
        runtimes: whose exports of an artefact are taken.

    Raises:
        UsageError: there is nothing to evaluate, or no such runtime.
        CheckpointError: the manifest does not say where the dense model is.
    """
    directory = artefact_directory(models)
    if directory is None:
        return find_sources(DEFAULT_DIRECTORY, dense, models, runtimes)
    manifest = read_manifest(directory)
    exports = [name for runtime in runtimes for name in EXPORTS.get(runtime, [runtime])]
    if isinstance(manifest, ExportManifest) or any((directory / name / MANIFEST).is_file() for name in exports):
        return find_sources(directory, dense, runtimes=runtimes)
    where = dense_source(directory, manifest).where if dense is None else dense
    return find_sources(directory, where, [directory], runtimes)
