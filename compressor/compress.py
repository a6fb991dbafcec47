"""The whole of `ssmc compress`: read a model, prune it, write the artefact."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ssmc.runtime.checkpoints import Checkpoint, load_checkpoint
from ssmc.runtime.device import choose_device
from ssmc.runtime.fast import use_fast_scan
from ssmc.runtime.files import refuse_existing
from ssmc.runtime.manifest import MANIFEST
from ssmc.runtime.progress import Progress, silent
from ssmc.runtime.text import read_texts
from ssmc.runtime.tiny import calibration_path
from ssmc.runtime.tokenizers import load_tokenizer, tokenizer_directory

from .artefact import write_artefact
from .calibration import Calibration, draw_samples
from .config import CompressConfig, configure
from .counts import kept
from .families import check_family
from .notes import notes_for
from .patterns import LAYER, SSM_MODULE
from .pipeline import LayerResult, prune_layers
from .placement import Stage
from .shedder import Removal, choose_removals, shed


@dataclass(frozen=True)
class CompressResult:
    """What `compress` did."""

    directory: Path
    manifest: dict[str, Any]
    layers: tuple[LayerResult, ...]  # empty when whole layers were removed
    removals: tuple[Removal, ...]  # whole layers or SSMs that were removed, in that order
    notes: tuple[str, ...]  # what the user should know about this choice


def compress(
    model: str | Path,
    *,
    out: str | Path = "ssmc-out",
    force: bool = False,
    progress: Progress = silent,
    command: str | None = None,
    **options: Any,
) -> CompressResult:
    """Prune a model in one shot and write it, masked, to a folder.

    Args:
        model: a transformers or mamba_ssm directory, a hub id, or "tiny".
        out: folder to write; it must not exist unless `force`.
        force: replace an earlier result of ssmc.
        progress: told what is being done.
        command: recorded in the manifest.
        options: fields of `CompressConfig`, or those a recipe names (`read_recipe`).

    Raises:
        SsmcError: with one sentence on what is wrong and what to do.
    """
    config = configure(model=str(model), **options)
    out = Path(out).expanduser()
    refuse_existing(out, force=force, marker=MANIFEST)  # before minutes of work, not after
    progress("reading the model", 0, 1)
    checkpoint = load_checkpoint(config.model, dtype=torch.float32)
    check_family(config, checkpoint.architecture.model_type)
    counts = kept(config, checkpoint.dimensions)  # what cannot be met is said before minutes of work
    tokenizer_source = tokenizer_directory(checkpoint, config.tokenizer)
    calibration = _calibration(config, checkpoint) if config.needs_text else None
    device = choose_device(config.device)
    use_fast_scan(checkpoint.model)
    tokens = None if calibration is None else calibration.tokens
    layers: list[LayerResult] = []
    removals: list[Removal] = []
    only_removed = config.pattern in (LAYER, SSM_MODULE) and not config.fits_out_proj
    if LAYER in config.parts or SSM_MODULE in config.parts:
        # every try runs most of the model, so all of it goes to the device
        tried = None if tokens is None else tokens.to(device)
        remove = shed if only_removed else choose_removals
        removals = remove(checkpoint.model.to(device), checkpoint.architecture, tried, config, progress)
        checkpoint.model.cpu()
    if not only_removed:
        removed = {removal.layer for removal in removals}
        layers = prune_layers(
            checkpoint.model,
            checkpoint.architecture,
            tokens,
            config,
            checkpoint.dtypes,
            progress,
            removed,
            Stage(device),
        )
    manifest = write_artefact(
        out, checkpoint, config, calibration, layers, removals, tokenizer_source, command=command, force=force
    )
    notes = notes_for(config, calibration, checkpoint.dimensions, counts)
    return CompressResult(out, manifest, tuple(layers), tuple(removals), tuple(notes))


def _calibration(config: CompressConfig, checkpoint: Checkpoint) -> Calibration:
    tokenizer = load_tokenizer(checkpoint, config.tokenizer)
    texts = read_texts(calibration_path() if config.calib is None else config.calib)
    return draw_samples(texts, tokenizer, config.nsamples, config.seqlen, config.seed)
