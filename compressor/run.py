"""The whole of `ssmc compress`: read a model, prune it, write the artefact."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, overload

import torch
from torch import nn

from ssmc.compressor.artefact import Artefact
from ssmc.compressor.calibration.draw import Calibration, draw_samples
from ssmc.compressor.calibration.placement import Stage
from ssmc.compressor.calibration.split import HELD_OUT
from ssmc.compressor.distillation.run import Lesson, distil_checkpoint
from ssmc.compressor.families import able_parts, check_family
from ssmc.compressor.fit import fitted
from ssmc.compressor.methods.layers.score import Removal
from ssmc.compressor.methods.method import LayerResult, Outcome, Plan
from ssmc.compressor.notes import notes_for
from ssmc.compressor.options.config import CompressConfig, configure
from ssmc.compressor.options.goal import split_goal
from ssmc.compressor.options.renamed import renamed
from ssmc.compressor.pipeline import Run, prune
from ssmc.compressor.plan import make_plan, plan_without_counts
from ssmc.compressor.search.carry_out import reach_goal
from ssmc.compressor.search.counting import Counting, require_reachable
from ssmc.compressor.torch_module.compress_module import CompressedModule, compress_module
from ssmc.runtime.device import choose_device
from ssmc.runtime.errors import UsageError
from ssmc.runtime.files import refuse_existing
from ssmc.runtime.manifest import MANIFEST
from ssmc.runtime.models.checkpoints import Checkpoint, load_checkpoint
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.models.tokenizers import load_tokenizer, tokenizer_directory
from ssmc.runtime.progress import NO_PROGRESS, Progress
from ssmc.runtime.tiny import calibration_path


@dataclass(frozen=True)
class CompressResult:
    """What `compress` did."""

    directory: Path
    manifest: dict[str, Any]
    outcome: Outcome  # the plan that was carried out, and what happened to each layer
    notes: tuple[str, ...]  # what the user should know about this choice

    @property
    def plan(self) -> Plan:
        """What was carried out."""
        return self.outcome.plan

    @property
    def config(self) -> CompressConfig:
        """Of the run; where a goal was given, the one that was found."""
        return self.outcome.plan.config

    @property
    def layers(self) -> tuple[LayerResult, ...]:
        """What happened to each layer; empty when only whole layers were removed."""
        return tuple(self.outcome.layers)

    @property
    def removals(self) -> tuple[Removal, ...]:
        """Whole layers or SSMs that were removed, in that order."""
        return tuple(self.outcome.removed)


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
    progress: Progress = NO_PROGRESS,
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
        options: fields of `CompressConfig` and `Goal`, or those a recipe names (`read_recipe`); of a torch module
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
    return _compress_checkpoint(str(model), Path(out).expanduser(), force, progress, command, options)


def _compress_checkpoint(
    model: str, out: Path, force: bool, progress: Progress, command: str | None, options: dict[str, Any]
) -> CompressResult:
    """As `compress`, of a model that is read from disk or the hub."""
    options, old_names = renamed({"model": model, **options})
    goal, ordinary = split_goal(options)
    config = configure(**ordinary)
    refuse_existing(out, force=force, marker=MANIFEST)  # before minutes of work, not after
    progress("reading the model", 0, 1)
    checkpoint = load_checkpoint(config.model, dtype=torch.float32)
    architecture, sizes = checkpoint.architecture, checkpoint.dimensions
    config = fitted(config, checkpoint)
    if goal is not None and "pattern" not in options:
        config = fitted(configure(**{**ordinary, "pattern": "+".join(able_parts(config, architecture))}), checkpoint)
    check_family(config, architecture, goal)
    plan = (make_plan if goal is None else plan_without_counts)(config, architecture, sizes, checkpoint.config)
    if goal is not None:
        require_reachable(Counting(checkpoint, config, goal))
    tokenizer_source = tokenizer_directory(checkpoint, config.tokenizer)
    calibration = tokens = reached = None
    if plan.needs_text or goal is not None:
        calibration, tokens = _draw(config, checkpoint, 0 if goal is None else HELD_OUT)
    device = choose_device(config.device)
    use_fast_scan(checkpoint.model)
    if goal is None:
        pruned = prune(Run(checkpoint.model, plan, tokens, checkpoint.dtypes, Stage(device), progress))
    else:
        reached = reach_goal(checkpoint, config, goal, tokens, device, progress)
        plan, pruned = reached.plan, reached.pruned
        checkpoint = replace(checkpoint, model=reached.model)
    distilled = None
    if config.distill:
        lesson = Lesson(config.distill, config.calib, config.seqlen, config.seed, config.tokenizer, config.device)
        distilled = asdict(distil_checkpoint(checkpoint, config.model, lesson, progress))
    outcome = Outcome(plan, pruned.layers, pruned.removals, calibration, distilled)
    artefact = Artefact(checkpoint, outcome, tokenizer_source, reached.record if reached else None, command)
    manifest = artefact.write(out, force=force)
    notes = (*old_names, *notes_for(outcome), *(reached.notes if reached else ()), *checkpoint.notes)
    return CompressResult(out, manifest, outcome, notes)


def _draw(config: CompressConfig, checkpoint: Checkpoint, more: int) -> tuple[Calibration, torch.Tensor]:
    """The samples a run is calibrated on, and all that were drawn: `more` besides, for the trials of a search."""
    tokenizer = load_tokenizer(checkpoint, config.tokenizer)
    source = calibration_path() if config.calib is None else config.calib
    drawn = draw_samples(source, tokenizer, config.nsamples + more, config.seqlen, config.seed)
    calibration = replace(drawn, tokens=drawn.tokens[: config.nsamples], requested=config.nsamples)
    return calibration, drawn.tokens
