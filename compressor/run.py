"""The whole of `ssmc compress`: read a model, prune it, write the artefact."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import torch
from torch import nn

from ssmc.compressor.artefact import write_artefact
from ssmc.compressor.calibration.draw import Calibration, draw_samples
from ssmc.compressor.calibration.split import HELD_OUT, Samples
from ssmc.compressor.counts import kept
from ssmc.compressor.families import able_parts, check_family
from ssmc.compressor.methods.layers import Removal
from ssmc.compressor.notes import notes_for
from ssmc.compressor.options.config import CompressConfig, configure
from ssmc.compressor.options.goal import Target, split_target
from ssmc.compressor.pipeline import LayerResult
from ssmc.compressor.prune import prune
from ssmc.compressor.search.carry_out import meet
from ssmc.compressor.torch_module.compress_module import CompressedModule, compress_module
from ssmc.runtime.device import choose_device
from ssmc.runtime.errors import UsageError
from ssmc.runtime.files import refuse_existing
from ssmc.runtime.manifest import MANIFEST
from ssmc.runtime.models.checkpoints import Checkpoint, load_checkpoint
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.models.tokenizers import load_tokenizer, tokenizer_directory
from ssmc.runtime.progress import Progress, silent
from ssmc.runtime.tiny import calibration_path


@dataclass(frozen=True)
class CompressResult:
    """What `compress` did."""

    directory: Path
    config: CompressConfig  # of the run; where a target was given, the one that was found
    manifest: dict[str, Any]
    layers: tuple[LayerResult, ...]  # empty when whole layers were removed
    removals: tuple[Removal, ...]  # whole layers or SSMs that were removed, in that order
    notes: tuple[str, ...]  # what the user should know about this choice


OUT = "ssmc-out"


@overload
def compress(model: str | Path, **options: Any) -> CompressResult: ...


@overload
def compress(model: nn.Module, batches: Iterable[Any], **options: Any) -> CompressedModule: ...


def compress(
    model: str | Path | nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    out: str | Path = OUT,
    force: bool = False,
    progress: Progress = silent,
    command: str | None = None,
    **options: Any,
) -> CompressResult | CompressedModule:
    """Prune a model in one shot and write it, masked, to a folder; or prune the mixers of a torch module in memory.

    Args:
        model: a transformers or mamba_ssm directory, a hub id, or "tiny"; or any torch module with Mamba or Mamba-2
            mixers in it, a language model or not.
        batches: what a torch module is run on, see `compress_module`; a checkpoint is calibrated on text (`calib`).
        out: folder to write; it must not exist unless `force`. Not for a torch module, which is returned.
        force: replace an earlier result of ssmc.
        progress: told what is being done.
        command: recorded in the manifest.
        options: fields of `CompressConfig` and `Target`, or those a recipe names (`read_recipe`); of a torch module
            those of `compress_module`.

    Raises:
        SsmcError: with one sentence on what is wrong and what to do.
    """
    if isinstance(model, nn.Module):
        if (out, force, command) != (OUT, False, None):
            raise UsageError(
                "out, force and command go with a checkpoint; a torch module is returned, save it yourself."
            )
        if batches is None:
            raise UsageError(
                "A torch module is calibrated by running it: give batches, as in compress(module, batches)."
            )
        return compress_module(model, batches, progress=progress, **options)
    if batches is not None:
        raise UsageError(
            f"batches go with a torch module; {model} is read from disk and calibrated on text: use calib."
        )
    target, ordinary = split_target({"model": str(model), **options})
    config = configure(**ordinary)
    out = Path(out).expanduser()
    refuse_existing(out, force=force, marker=MANIFEST)  # before minutes of work, not after
    progress("reading the model", 0, 1)
    checkpoint = load_checkpoint(config.model, dtype=torch.float32)
    sizes, family = checkpoint.dimensions, checkpoint.architecture
    if target is not None and "pattern" not in options:
        config = configure(**{**ordinary, "pattern": "+".join(able_parts(config, family))})
    check_family(config, family, target is not None)
    if target is None:
        kept(config, sizes)  # what cannot be met is said before minutes of work
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
    notes += checkpoint.notes
    return CompressResult(out, config, manifest, pruned.layers, pruned.removals, tuple(notes))


def _calibration(
    config: CompressConfig, checkpoint: Checkpoint, target: Target | None
) -> tuple[Calibration | None, Samples | None]:
    """The samples a run is calibrated on, and those for the trials of a target; None what is not needed."""
    if target is None and not config.needs_text:
        return None, None
    tokenizer = load_tokenizer(checkpoint, config.tokenizer)
    source = calibration_path() if config.calib is None else config.calib
    nsamples, more = config.nsamples, 0 if target is None else HELD_OUT
    drawn = draw_samples(source, tokenizer, nsamples + more, config.seqlen, config.seed)
    calibration = replace(drawn, tokens=drawn.tokens[:nsamples], requested=nsamples)
    return calibration, None if target is None else Samples.split(drawn.tokens, nsamples)
