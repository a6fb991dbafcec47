"""What `compress` leaves behind: a masked model of the original shape, and a manifest that says how it came about."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ssmc.compressor.calibration.draw import Calibration
from ssmc.compressor.methods.method import LayerResult, Outcome
from ssmc.compressor.methods.quantize.summary import packed, summary
from ssmc.compressor.options.config import CompressConfig
from ssmc.compressor.options.patterns import LAYER, WIDTH
from ssmc.compressor.options.recipe import RECIPE, write_recipe
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
from ssmc.runtime.quantized import Quantized, write_quantized
from ssmc.runtime.versions import versions


@dataclass(frozen=True)
class Artefact:
    """What is going to be written.

    Attributes:
        checkpoint: the masked model.
        outcome: of the run.
        tokenizer_directory: where the tokenizer files are; None when there are none.
        goal: what a search aimed at and how it was met; None where the user gave a sparsity.
        command: the command line, for the manifest.
    """

    checkpoint: Checkpoint
    outcome: Outcome
    tokenizer_directory: Path | None = None
    goal: dict[str, Any] | None = None
    command: str | None = None

    def write(self, out: Path, *, force: bool) -> dict[str, Any]:
        """Write the masked model, its tokenizer and the manifest to `out`; either all of it appears or nothing.

        Args:
            out: folder that will be made.
            force: replace an earlier artefact, if ssmc wrote it.

        Returns:
            The manifest.

        Raises:
            OutputError: see `new_directory`.
        """
        recipe = self.outcome.plan.config
        about = (self.checkpoint, self.tokenizer_directory, self._manifest(out), recipe)
        return write_masked(out, *about, force=force, codes=packed(self.outcome))

    def complete(self, folder: Path, files: list[Path], out: Path) -> dict[str, Any]:
        """Write what goes with a masked model and the manifest of all of it.

        Args:
            folder: holds the model.
            files: of the model.
            out: what the folder will be called.

        Returns:
            The manifest.
        """
        for left in set(folder.iterdir()) - set(files):  # by a run that ended here, and which goes on
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        about = (self._manifest(out), self.outcome.plan.config)
        return _complete(folder, files, self.checkpoint, self.tokenizer_directory, *about)

    def _manifest(self, out: Path) -> MaskedManifest:
        """Without the number of parameters and the files."""
        config = self.outcome.plan.config
        part = BLOCK if LAYER in config.parts else SSM
        return MaskedManifest(
            source=self._source(out),
            versions=versions(),
            command=self.command,
            config=config.model_dump(mode="json", exclude={"device"}),
            calibration=_calibration(self.outcome.calibration),
            dimensions=self.checkpoint.dimensions.as_dict(),
            layers=tuple(_layer(layer) for layer in self.outcome.layers),
            removed=tuple(RemovalRecord(r.layer, part, r.loss, r.influence) for r in self.outcome.removed),
            goal=self.goal,
            distilled=self.outcome.distilled,
            quantized=summary(self.outcome, self.checkpoint.tensors()),
            width=next((r.as_manifest() for r in self.outcome.outside if r.name == WIDTH), None),
        )

    def _source(self, out: Path) -> Origin:
        """The dense model, so that `bench` finds it again: as it was named, and seen from the artefact."""
        local = Path(self.checkpoint.source).expanduser()
        relative = os.path.relpath(local, out) if local.exists() else None
        return Origin(self.checkpoint.source, self.checkpoint.format, relative)


def write_masked(
    out: Path,
    checkpoint: Checkpoint,
    tokenizer_directory: Path | None,
    manifest: MaskedManifest,
    recipe: CompressConfig | Path | None,
    *,
    force: bool,
    codes: Mapping[str, Quantized] = MappingProxyType({}),
) -> dict[str, Any]:
    """Write a masked model with all that belongs to it; either all of it appears or nothing.

    Args:
        out: folder that will be made.
        checkpoint: the model.
        tokenizer_directory: where the tokenizer files are; None when there are none.
        manifest: without the number of parameters and the files, which are filled in.
        recipe: of the run, or the file that holds it; None: there is none.
        force: replace an earlier artefact, if ssmc wrote it.
        codes: of the weights that are in few bits, by the names of their tensors.

    Returns:
        The manifest.

    Raises:
        OutputError: see `new_directory`.
    """
    tensors = checkpoint.tensors()
    require_space(out, tensor_bytes(tensors))
    with new_directory(out, force=force, marker=MANIFEST) as folder:
        files = write_checkpoint(folder, tensors, checkpoint.config, like=checkpoint)
        if codes:
            files.append(write_quantized(folder, codes))
        return _complete(folder, files, checkpoint, tokenizer_directory, manifest, recipe)


def _complete(
    folder: Path,
    files: list[Path],
    checkpoint: Checkpoint,
    tokenizer_directory: Path | None,
    manifest: MaskedManifest,
    recipe: CompressConfig | Path | None,
) -> dict[str, Any]:
    """Write what goes with the files of a masked model into its folder; see `write_masked`."""
    files = files + copy_companions(checkpoint.directory, tokenizer_directory, folder)
    if isinstance(recipe, Path):
        files.append(Path(shutil.copyfile(recipe, folder / RECIPE)))
    elif recipe is not None:
        files.append(write_recipe(folder, recipe))
    whole = replace(manifest, parameters=parameter_count(checkpoint.tensors()), files=file_records(files, folder))
    write_manifest(folder, whole)
    return whole.to_json()


def _layer(layer: LayerResult) -> LayerRecord:
    """The entry of a layer: what stays, and what the methods say of it."""
    findings = layer.findings()
    modules = tuple(ModuleRecord(**entry) for entry in findings.pop("modules"))
    return LayerRecord(layer.states_kept, layer.channels_kept, modules, findings, dict(layer.units_kept))


def _calibration(calibration: Calibration | None) -> dict[str, Any] | None:
    if calibration is None:
        return None
    nsamples, seqlen = calibration.tokens.shape
    return {"source": calibration.source, "sha256": calibration.sha256, "nsamples": nsamples, "seqlen": seqlen}
