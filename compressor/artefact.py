"""What `compress` leaves behind: a masked model of the original shape, and a manifest that says how it came about."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ssmc.compressor.calibration.draw import Calibration
from ssmc.compressor.options.config import CompressConfig
from ssmc.compressor.options.patterns import LAYER
from ssmc.compressor.options.recipe import write_recipe
from ssmc.compressor.pipeline import LayerResult
from ssmc.compressor.prune import Pruned
from ssmc.runtime.files import new_directory, require_space
from ssmc.runtime.manifest import (
    BLOCK,
    MANIFEST,
    SSM,
    LayerRecord,
    MaskedManifest,
    ModuleRecord,
    Origin,
    RemovalRecord,
    file_records,
    write_manifest,
)
from ssmc.runtime.models.checkpoints import Checkpoint, parameter_count, tensor_bytes, write_checkpoint
from ssmc.runtime.models.companions import copy_companions
from ssmc.runtime.versions import versions


def write_artefact(
    out: Path,
    checkpoint: Checkpoint,
    config: CompressConfig,
    calibration: Calibration | None,
    pruned: Pruned,
    tokenizer_directory: Path | None,
    *,
    target: dict[str, Any] | None = None,
    command: str | None,
    force: bool,
) -> dict[str, Any]:
    """Write the masked model, its tokenizer and the manifest to `out`; either all of it appears or nothing.

    Args:
        out: folder that will be made; an existing one is replaced only with `force`, and only if ssmc wrote it.
        checkpoint: the masked model.
        config: the run's configuration.
        calibration: what the statistics were computed on; None when the score needed none.
        pruned: what happened to each layer, and what was removed as a whole.
        tokenizer_directory: where the tokenizer files are; None when there are none.
        target: what was aimed at and how it was met; None where the user gave a sparsity.
        command: the command line, for the manifest.
        force: replace an earlier artefact.

    Returns:
        The manifest.

    Raises:
        OutputError: see `new_directory`.
    """
    tensors = checkpoint.tensors()
    require_space(out, tensor_bytes(tensors))
    with new_directory(out, force=force, marker=MANIFEST) as folder:
        files = write_checkpoint(folder, tensors, checkpoint.config, like=checkpoint)
        files += copy_companions(checkpoint.directory, tokenizer_directory, folder)
        files.append(write_recipe(folder, config))
        part = BLOCK if LAYER in config.parts else SSM
        manifest = MaskedManifest(
            source=_source(checkpoint, out),
            versions=versions(),
            command=command,
            config=config.model_dump(mode="json", exclude={"device"}),
            calibration=_calibration(calibration),
            dimensions=checkpoint.dimensions.as_dict(),
            layers=tuple(_layer(layer) for layer in pruned.layers),
            removed=tuple(RemovalRecord(r.layer, part, r.loss, r.influence) for r in pruned.removals),
            target=target,
            parameters=parameter_count(tensors),
            files=file_records(files, folder),
        )
        write_manifest(folder, manifest)
    return manifest.to_json()


def _source(checkpoint: Checkpoint, out: Path) -> Origin:
    """The dense model, so that `bench` finds it again: as it was named, and seen from the artefact."""
    local = Path(checkpoint.source).expanduser()
    return Origin(checkpoint.source, checkpoint.format, os.path.relpath(local, out) if local.exists() else None)


def _calibration(calibration: Calibration | None) -> dict[str, Any] | None:
    if calibration is None:
        return None
    nsamples, seqlen = calibration.tokens.shape
    return {"source": calibration.source, "sha256": calibration.sha256, "nsamples": nsamples, "seqlen": seqlen}


def _layer(layer: LayerResult) -> LayerRecord:
    findings = {
        "out_proj_error": None if layer.fitted is None else asdict(layer.fitted),
        "repaired": layer.repaired,
        "error": layer.error,
        "error_unrepaired": layer.error_unrepaired,
        **({} if layer.norm_spread is None else {"norm_spread": layer.norm_spread}),
        "a_log_zeros": layer.a_log_zeros,
        "refined": None if layer.refined is None else asdict(layer.refined),
    }
    modules = tuple(ModuleRecord(**asdict(module)) for module in layer.modules)
    return LayerRecord(layer.kept, layer.channels, modules, findings)
