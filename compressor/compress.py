"""The whole of `ssmc compress`: read a model, prune it, write the artefact."""

from __future__ import annotations

from dataclasses import dataclass, replace
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
from .families import able_parts, check_family
from .meet import meet
from .notes import notes_for
from .pipeline import LayerResult
from .prune import prune
from .samples import HELD_OUT, Samples
from .shedder import Removal
from .target import Target, split_target


@dataclass(frozen=True)
class CompressResult:
    """What `compress` did."""

    directory: Path
    config: CompressConfig  # of the run; where a target was given, the one that was found
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
        options: fields of `CompressConfig` and `Target`, or those a recipe names (`read_recipe`).

    Raises:
        SsmcError: with one sentence on what is wrong and what to do.
    """
    target, ordinary = split_target({"model": str(model), **options})
    config = configure(**ordinary)
    out = Path(out).expanduser()
    refuse_existing(out, force=force, marker=MANIFEST)  # before minutes of work, not after
    progress("reading the model", 0, 1)
    checkpoint = load_checkpoint(config.model, dtype=torch.float32)
    sizes, family = checkpoint.dimensions, checkpoint.architecture.model_type
    if target is None:
        kept(config, sizes)  # what cannot be met is said before minutes of work
    elif "pattern" not in options:
        config = configure(**{**ordinary, "pattern": "+".join(able_parts(config, family))})
    check_family(config, family, target is not None)
    tokenizer_source = tokenizer_directory(checkpoint, config.tokenizer)
    calibration, samples = _calibration(config, checkpoint, target)
    device = choose_device(config.device)
    use_fast_scan(checkpoint.model)
    tokens = None if calibration is None else calibration.tokens
    met = None
    if target is None:
        pruned = prune(checkpoint.model, checkpoint.architecture, tokens, config, checkpoint.dtypes, device, progress)
    else:
        met = meet(checkpoint, config, target, tokens, samples, device, progress)
        config, pruned = met.config, met.pruned
        checkpoint = replace(checkpoint, model=met.model)
    manifest = write_artefact(
        out,
        checkpoint,
        config,
        calibration,
        pruned,
        tokenizer_source,
        target=None if met is None else met.record,
        command=command,
        force=force,
    )
    spreads = [layer.norm_spread for layer in pruned.layers if layer.norm_spread is not None]
    notes = notes_for(config, calibration, sizes, kept(config, sizes), checkpoint.architecture, spreads)
    notes += [] if met is None else met.notes
    return CompressResult(out, config, manifest, pruned.layers, pruned.removals, tuple(notes))


def _calibration(
    config: CompressConfig, checkpoint: Checkpoint, target: Target | None
) -> tuple[Calibration | None, Samples | None]:
    """The samples a run is calibrated on, and those for the trials of a target; None what is not needed."""
    if target is None and not config.needs_text:
        return None, None
    tokenizer = load_tokenizer(checkpoint, config.tokenizer)
    texts = read_texts(calibration_path() if config.calib is None else config.calib)
    nsamples, more = config.nsamples, 0 if target is None else HELD_OUT
    drawn = draw_samples(texts, tokenizer, nsamples + more, config.seqlen, config.seed)
    calibration = replace(drawn, tokens=drawn.tokens[:nsamples], requested=nsamples)
    return calibration, None if target is None else Samples.split(drawn.tokens, nsamples)
