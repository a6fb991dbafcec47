"""The whole of `ssmc compress`: read a model, prune it, write the artefact."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch
from torch import nn

from ssmc.compressor.artefact import Artefact
from ssmc.compressor.calibration.draw import Calibration, draw_samples
from ssmc.compressor.calibration.placement import Stage
from ssmc.compressor.calibration.split import HELD_OUT
from ssmc.compressor.distillation.narrowed import Left
from ssmc.compressor.distillation.run import Lesson, distil_checkpoint
from ssmc.compressor.distillation.state import StateFile
from ssmc.compressor.distillation.steps import Distillation
from ssmc.compressor.families import able_parts, check_family, searches_axes, searches_width
from ssmc.compressor.fit import fitted
from ssmc.compressor.foreseen import Refusal, configuration_left, refuse_misfit
from ssmc.compressor.memory import check_limit, check_whole, need
from ssmc.compressor.methods.layers.score import Removal
from ssmc.compressor.methods.method import LayerResult, Outcome, Plan
from ssmc.compressor.notes import notes_for
from ssmc.compressor.options.config import CompressConfig, configure
from ssmc.compressor.options.goal import Goal, split_goal
from ssmc.compressor.options.patterns import WIDTH
from ssmc.compressor.options.renamed import renamed
from ssmc.compressor.pipeline import Run, prune
from ssmc.compressor.plan import make_plan, plan_without_counts
from ssmc.compressor.search.carry_out import reach_goal
from ssmc.compressor.search.counting import Counting, require_reachable
from ssmc.compressor.search.hybrid import check_goal, reach_goal_of_hybrid
from ssmc.compressor.search.hybrid_sizes import HybridSizes
from ssmc.compressor.streaming import HIDDEN, Result, check_samples, check_shares, goes_by_layer, identity
from ssmc.compressor.torch_module.compress_module import CompressedModule, compress_module
from ssmc.runtime.amounts import parse_bytes
from ssmc.runtime.collectives import from_first, joined, share
from ssmc.runtime.device import choose_device
from ssmc.runtime.errors import SsmcError, UsageError
from ssmc.runtime.files import refuse_existing, require_space, resolve
from ssmc.runtime.locks import remove_leftovers
from ssmc.runtime.manifest import MANIFEST
from ssmc.runtime.models.checkpoints import Checkpoint, load_checkpoint, tensor_bytes
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.models.tokenizers import load_tokenizer, tokenizer_directory
from ssmc.runtime.progress import NO_PROGRESS, Progress
from ssmc.runtime.ranks import is_first, rank
from ssmc.runtime.resumable import Resumable, resumable
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
    resume: bool = False,
    max_memory: str | int | None = None,
    progress: Progress = NO_PROGRESS,
    command: str | None = None,
    refuse: Refusal | None = None,
    **options: Any,
) -> CompressResult | CompressedModule:
    """Prune a model in one shot and write it, masked, to a folder; or prune the mixers of a torch module in memory.

    Args:
        model: a transformers or mamba_ssm directory, a hub id, or "tiny"; or any torch module with Mamba or Mamba-2
            mixers in it, a language model or not.
        batches: what a torch module is run on, see `compress_module`; a checkpoint is calibrated on text (`calib`).
        out: folder to write; it must not exist unless `force`. Not for a torch module, which is returned.
        force: replace an earlier result of ssmc.
        resume: go on after the last layer that an earlier run with the same options and `out` finished, however it
            ended, or after the last judgement of its distillation; the result is the same, byte for byte.
        max_memory: what the process may have resident, "8GiB" or bytes. Hidden states that do not fit lie on disk; a
            run that needs more is refused before it starts.
        progress: told what is being done.
        command: recorded in the manifest.
        refuse: refuses configurations of hybrids that nothing would run where the result is for, before any work; a
            search leaves them out (`ssmc.exporters.foresight.refuse_left`, as the command line has it for --for).
        options: fields of `CompressConfig` and `Goal`, or those a recipe names (`read_recipe`); of a torch module
            those of `compress_module`.

    Raises:
        SsmcError: with one sentence on what is wrong and what to do.
    """
    if isinstance(model, nn.Module):
        if (out, force, resume, max_memory, command, refuse) != (OUT, False, False, None, None, None):
            raise UsageError(
                "out, force, resume, max_memory, command and refuse go with a checkpoint; a torch module is returned, "
                "save it yourself."
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
    limit = None if max_memory is None else parse_bytes(max_memory, "--max-memory")
    order = _Order(Path(out).expanduser(), force, resume, limit, progress, command, refuse)
    return _compress_checkpoint(str(model), order, options)


@dataclass(frozen=True)
class _Order:
    """How a run is carried out, which changes nothing of its result; see `compress`."""

    out: Path
    force: bool
    resume: bool
    limit: int | None  # bytes of memory
    progress: Progress
    command: str | None
    refuse: Refusal | None


def _compress_checkpoint(model: str, order: _Order, options: dict[str, Any]) -> CompressResult:
    """As `compress`, of a model that is read from disk or the hub."""
    options, old_names = renamed({"model": model, **options})
    goal, ordinary = split_goal(options)
    config = configure(**ordinary)
    if is_first():
        refuse_existing(order.out, force=order.force, marker=MANIFEST)  # before minutes of work, not after
    state = _kept_state(order, config, goal)
    order.progress("reading the model", 0, 1)
    checkpoint = load_checkpoint(config.model, dtype=torch.float32, lazy=True)
    if goal is not None:
        check_whole(checkpoint, config, order.limit, searches=True)
        checkpoint.read()
    architecture, sizes = checkpoint.architecture, checkpoint.dimensions
    config = fitted(config, checkpoint)
    by_axes = goal is not None and searches_axes(architecture, goal)
    if goal is not None and "pattern" not in options:
        able = able_parts(config, architecture, goal)
        if by_axes:
            axes = HybridSizes(checkpoint, runtime=config.runtime, round_to=config.round_to).axes
            able = [part for part in axes if part != WIDTH or searches_width(architecture, goal)]
        config = fitted(configure(**{**ordinary, "pattern": "+".join(able)}), checkpoint)
    check_family(config, architecture, goal)
    plan = (make_plan if goal is None else plan_without_counts)(config, architecture, sizes, checkpoint.config)
    check_shares(plan)
    if goal is None:
        refuse_misfit(plan)
        if order.refuse is not None and (left := configuration_left(plan)) is not None:
            order.refuse(architecture, left)
    if goal is not None and goal.candidate is not None and not by_axes:
        raise UsageError("Candidates are listed by a search over the axes of a hybrid. Leave --candidate out.")
    if goal is not None and by_axes:
        check_goal(checkpoint, config, goal)
    elif goal is not None:
        require_reachable(Counting(checkpoint, config, goal))
    tokenizer_source = tokenizer_directory(checkpoint, config.tokenizer)
    calibration = tokens = None
    if plan.needs_text or goal is not None:
        calibration, tokens = _draw(config, checkpoint, 0 if goal is None else HELD_OUT)
    task = _Task(checkpoint, plan, calibration, tokens, tokenizer_source)
    if goal is None and goes_by_layer(plan):
        outcome, manifest, more = _by_layer(task, order)
    else:
        outcome, manifest, more = _whole(task, order, goal, state)
    notes = (*old_names, *notes_for(outcome), *more, *checkpoint.notes)
    return CompressResult(order.out, manifest, outcome, notes)


@dataclass(frozen=True)
class _Task:
    """A run that is ready to start; see `Run` and `Artefact`."""

    checkpoint: Checkpoint
    plan: Plan
    calibration: Calibration | None
    tokens: torch.Tensor | None
    tokenizer: Path | None


_Done = tuple[Outcome, dict[str, Any], Sequence[str]]  # what happened, the manifest, notes


def _by_layer(task: _Task, order: _Order) -> _Done:
    """Prune and write one layer after the other."""
    checkpoint, plan = task.checkpoint, task.plan
    use_fast_scan(checkpoint.model)
    device, spills, more = choose_device(plan.config.device), False, 0
    check_samples(task.tokens)
    tokens = share(task.tokens)
    if checkpoint.streamed is not None:
        found = need(checkpoint, plan, None if tokens is None else (tokens.shape[0], tokens.shape[1]))
        check_limit(found, order.limit)
        spills, checkpoint.streamed.kept = found.spills(order.limit), found.kept(order.limit)
        more = found.hidden if spills else 0
    else:
        check_whole(checkpoint, plan.config, order.limit)
    require_space(order.out, tensor_bytes(checkpoint.tensors()) + more)
    what = identity(checkpoint, plan, task.tokens, device.type)
    with joined(device), _result(checkpoint, what, order) as result:
        spill = result.work.beside / f"{HIDDEN}-{rank()}" if spills else None
        stage = Stage(device, streamed=checkpoint.streamed, spill=spill)
        run = Run(checkpoint.model, plan, tokens, checkpoint.dtypes, stage, order.progress, result)
        outcome = Outcome(plan, prune(run).layers, (), task.calibration)
        manifest: dict[str, Any] = {}
        if is_first():
            artefact = Artefact(checkpoint, outcome, task.tokenizer, None, result.work.about["command"])
            manifest = artefact.complete(result.work.folder, result.rest(), order.out)
        manifest = from_first(manifest)
    return outcome, manifest, result.work.notes


@contextmanager
def _result(checkpoint: Checkpoint, what: Mapping[str, Any], order: _Order) -> Iterator[Result]:
    """Where layers go: the first process writes them, the others know where."""
    if not is_first():
        said = from_first()
        if "error" in said:
            raise UsageError(said["error"])
        steps = {int(number): note for number, note in said["steps"].items()}
        yield Result(checkpoint, Resumable(Path(said["folder"]), Path(said["beside"]), {}, steps), follows=True)
        return
    about = {"command": order.command}
    told = False
    try:
        with resumable(order.out, what, about, force=order.force, marker=MANIFEST, resume=order.resume) as work:
            result = Result(checkpoint, work)
            said = {"folder": str(work.folder), "beside": str(work.beside), "steps": work.steps}
            from_first(said)
            told = True
            yield result
    except SsmcError as error:
        if not told:
            from_first({"error": str(error)})
        raise


def _whole(task: _Task, order: _Order, goal: Goal | None, state: StateFile | None) -> _Done:
    """Prune a model in memory, then write it: what looks at all of it at once."""
    if order.resume and state is None:
        raise UsageError(
            "A run that looks at the whole model at once (a goal, --quantize, --pattern layer, width or ssm-module, "
            "--score fisher) cannot be resumed. Leave --resume out."
        )
    check_samples(task.tokens)
    if goal is None:
        check_whole(task.checkpoint, task.plan.config, order.limit)
    with joined(choose_device(task.plan.config.device)):
        return _whole_in_memory(task, order, goal, state)


def _whole_in_memory(task: _Task, order: _Order, goal: Goal | None, state: StateFile | None) -> _Done:
    """As `_whole`, of a run that can be carried out."""
    leftovers = remove_leftovers(resolve(order.out)) if is_first() else []
    checkpoint, plan, config, progress = task.checkpoint, task.plan, task.plan.config, order.progress
    checkpoint.read()
    device, reached, distilled = choose_device(config.device), None, None
    use_fast_scan(checkpoint.model)
    teach = partial(_distil, config=config, state=state, progress=progress)
    if goal is None:
        pruned = prune(Run(checkpoint.model, plan, share(task.tokens), checkpoint.dtypes, Stage(device), progress))
        distilled = teach(checkpoint, pruned.layers) if config.distill else None
    else:
        distil = teach if config.distill else None
        by_axes = searches_axes(checkpoint.architecture, goal)
        reach = partial(reach_goal_of_hybrid, refuse=order.refuse) if by_axes else reach_goal
        reached = reach(checkpoint, config, goal, task.tokens, device, progress, distil=distil)
        plan, pruned, distilled = reached.plan, reached.pruned, reached.distillation
        checkpoint = replace(checkpoint, model=reached.model)
    done = None if distilled is None else asdict(distilled)
    outcome = Outcome(plan, pruned.layers, pruned.removals, task.calibration, done, pruned.outside)
    artefact = Artefact(checkpoint, outcome, task.tokenizer, reached.record if reached else None, order.command)
    manifest = from_first(artefact.write(order.out, force=order.force) if is_first() else {})
    if state is not None and is_first():
        state.remove()
    return outcome, manifest, (*leftovers, *(reached.notes if reached else ()))


def _distil(
    checkpoint: Checkpoint,
    layers: Sequence[LayerResult],
    config: CompressConfig,
    state: StateFile | None,
    progress: Progress,
) -> Distillation:
    """The steps of a run on the whole model that is left, in place."""
    steps, window = config.distill_steps, config.seqlen
    lesson = Lesson(steps, config.calib, window, config.seed, config.tokenizer, config.device)
    left = [Left(layer.states_kept, layer.channels_kept) for layer in layers]
    return distil_checkpoint(checkpoint, config.model, lesson, progress, layers=left, state=state)


def _kept_state(order: _Order, config: CompressConfig, goal: Goal | None) -> StateFile | None:
    """Where the distillation of a run keeps its state; None: it has none, or measured times decide where it starts.

    Raises:
        UsageError: there is a state that nobody asked for, or none where one was.
    """
    if goal is not None or not config.distill:
        return None
    state = StateFile.beside(order.out, order.resume)
    if is_first():
        state.check()
    return state


def _draw(config: CompressConfig, checkpoint: Checkpoint, more: int) -> tuple[Calibration, torch.Tensor]:
    """The samples a run is calibrated on, and all that were drawn: `more` besides, for the trials of a search."""
    tokenizer = load_tokenizer(checkpoint, config.tokenizer)
    source = calibration_path() if config.calib is None else config.calib
    drawn = draw_samples(source, tokenizer, config.nsamples + more, config.seqlen, config.seed)
    calibration = replace(drawn, tokens=drawn.tokens[: config.nsamples], requested=config.nsamples)
    return calibration, drawn.tokens
