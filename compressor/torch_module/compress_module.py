"""Any torch module: its Mamba and Mamba-2 mixers are pruned, calibrated by running the module itself.

A language model is walked block by block (`pipeline`). Of any other module only the mixers are known, so what a mixer
reads is found by running the whole module on the user's batches up to it, the mixers before it being pruned already.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ssmc.compressor.families import check_family
from ssmc.compressor.methods.method import KeepCounts, Plan
from ssmc.compressor.methods.registry import score
from ssmc.compressor.options.config import CompressConfig, configure
from ssmc.compressor.options.goal import Goal
from ssmc.compressor.options.patterns import CHANNEL
from ssmc.compressor.plan import make_plan
from ssmc.compressor.torch_module.directions import check_directions, prune_directions
from ssmc.compressor.torch_module.forward import SEQUENCES, Forward, Use, WatchedModule, evaluating, run_on
from ssmc.compressor.torch_module.mamba3 import check_options, prune_mamba3
from ssmc.compressor.torch_module.mixer import PARTS, MixerPruner, MixerResult, in_order, left_as_it_is, touched
from ssmc.compressor.torch_module.restore import Restorer, keep_attributes
from ssmc.runtime.errors import CheckpointError, UsageError
from ssmc.runtime.models.directions import DirectionalMixer, find_directional
from ssmc.runtime.models.mamba3 import Mamba3Mixer, find_mamba3
from ssmc.runtime.models.mixers import Mixer, find_mixers, tell_configurations
from ssmc.runtime.models.stock_kernels import guard_kernels
from ssmc.runtime.progress import NO_PROGRESS, Progress

_OF_A_CHECKPOINT: tuple[str, ...] = ("model", "calib", "nsamples", "seqlen", "tokenizer", "device")
_OF_A_CHECKPOINT += ("target", "scope", "ffn_score", "alpha", "quantize", "quantize_method", "group_size")
_OF_A_CHECKPOINT += ("symmetric", "quantize_modules", "quantize_embedding", "hidden_dtype")

_OTHERWISE = (
    "has the parameters of a Mamba, but its forward computes something else (a norm on B, C or dt, a second direction, "
    "a cache)"
)

COMPILED = (
    "The module was compiled. The smaller one that is returned is not; give it to torch.compile again if you like."
)


@dataclass(frozen=True)
class CompressedModule:
    """What `compress_module` did."""

    module: nn.Module
    config: CompressConfig
    mixers: tuple[MixerResult, ...]  # in the order they run
    parameters: tuple[int, int]  # before and after
    remarks: tuple[str, ...] = ()  # on the module as a whole

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know, each thing once: mixers that were left as they are, or did not get smaller."""
        named: dict[str, list[str]] = defaultdict(list)
        for mixer in self.mixers:
            if mixer.note:
                named[mixer.note].append(mixer.name or "the mixer")
        return (*self.remarks, *(f"{', '.join(names)}: {note}" for note, names in named.items()))


@torch.no_grad()
def compress_module(
    module: nn.Module,
    batches: Iterable[Any],
    *,
    in_place: bool = False,
    forward: Forward = run_on,
    progress: Progress = NO_PROGRESS,
    **options: Any,
) -> CompressedModule:
    """Prune the Mamba, Mamba-2 and Mamba-3 mixers of a module, whatever it is for, and cut them to their new size.

    A mixer is known by the names and shapes of its parameters (those of transformers, mamba_ssm and mamba-minimal) and
    by its own forward, which must put out on the first batch what this structure says. Each is pruned on what it reads
    when the module runs on the batches with the mixers before it pruned. With `repair`, the C rows of a Mamba-1 are
    mixed; the rest is fitted to what the dense mixer puts out for the same input. A mixer that cannot be pruned is left
    as it is, with a note; so is one that shares a parameter that would change with another part of the module.

    Memory does not grow with the number of batches for the pattern column of a Mamba-1 by
    `torch_module.mixer.streaming_scores`; otherwise what one mixer reads is kept, and then all sequences must have one
    length. Batches are run once for each mixer that needs them, up to that mixer.

    Args:
        module: any torch module; in eval mode while it is run.
        batches: what to run it on: an iterable that can be read several times, such as a list or a DataLoader.
        in_place: change `module` itself; by default a copy is made and `module` stays as it is. After an error it is as
            it was in either case.
        forward: called as `forward(module, batch)`; by default a tensor is the module's only argument, a tuple or list
            are several, a mapping is given by name. A loader of (input, label) needs `lambda m, b: m(b[0])`.
        progress: told what is being done.
        options: fields of `CompressConfig`: pattern (column, channel, column+channel), sparsity, score, weighting,
            repair, refine, seed, round_to, round_channels, and states or widths with a number for each mixer.

    Returns:
        The smaller module and what was removed.

    Raises:
        UsageError: an option makes no sense.
        CheckpointError: the module has no mixer that can be pruned.
        CalibrationError: there are no batches, the module does not run on them, or they give NaN.
    """
    config = _configured(module, options)
    own = getattr(module, "_orig_mod", module)  # of a module that torch.compile wrapped
    remarks = () if own is module else (COMPILED,)
    if isinstance(own, torch.jit.ScriptModule):
        raise CheckpointError(
            f"This {type(own).__name__} was traced or scripted by torch.jit, which fixes its sizes. Give the module "
            "that it was made from."
        )
    before = _parameters(own)
    _Found.inside(own).check(config)  # before a copy of something big
    work = own if in_place else _copy(own)
    found = _Found.inside(work)
    restorer = Restorer([*found.ordinary, *found.third, *found.directional]) if in_place else None
    try:
        with evaluating(work), torch.compiler.set_stance("force_eager"):
            watched = WatchedModule(work, batches, forward, progress)
            results = _prune(watched, found.ordinary, config, restorer) if found.ordinary else []
            results += prune_mamba3(watched, found.third, config, restorer) if found.third else []
            results += prune_directions(watched, found.directional, config, restorer) if found.directional else []
        _require_one(work, results)
        if all(result.layer is not None for result in results):
            undo = _tell(work, results)
            if undo is not None and restorer is not None:
                restorer.remember(undo)
    except BaseException:
        if restorer is not None:
            restorer.restore()
        raise
    return CompressedModule(work, config, tuple(results), (before, _parameters(work)), remarks)


@dataclass(frozen=True)
class _Found:
    """The mixers of a module, by what is known of them."""

    ordinary: list[Mixer]  # of families that language models have
    third: list[Mamba3Mixer]
    directional: list[DirectionalMixer]

    @classmethod
    def inside(cls, module: nn.Module) -> _Found:
        """Those of a module.

        Raises:
            CheckpointError: there is none.
        """
        third, directional = find_mamba3(module), find_directional(module)
        several = {id(mixer.module) for mixer in directional}  # which look like a Mamba-1 with something more
        mixers = find_mixers(guard_kernels(module), beside=len(third) + len(directional))
        return cls([mixer for mixer in mixers if id(mixer.module) not in several], third, directional)

    def check(self, config: CompressConfig) -> None:
        """Refuse what does not go with any of them.

        Raises:
            UsageError: naming what can be used.
        """
        if self.third:
            check_options(config)
        if self.directional:
            check_directions(config)


def _prune(
    watched: WatchedModule, mixers: list[Mixer], config: CompressConfig, restorer: Restorer | None
) -> list[MixerResult]:
    """Prune the mixers that can be, in the order they are first called."""
    watched.progress("looking at the mixers", 0, 1)
    uses = watched.look(mixers)
    order = in_order(mixers, uses)
    notes = {mixer.name: uses.get(mixer.name, Use()).reason_to_leave(SEQUENCES, _OTHERWISE) for mixer in order}
    reasons = {name: note for name, note in notes.items() if note is not None}
    plans = _plans(config, [mixer for mixer in order if mixer.name not in reasons], reasons)
    reasons |= _ties(watched.module, [mixer for mixer in order if mixer.name in plans], plans)
    able = [mixer for mixer in order if mixer.name not in reasons]
    if not able:
        return [left_as_it_is(mixer, reasons[mixer.name]) for mixer in order]
    pruner = MixerPruner(watched, _together([plans[mixer.name] for mixer in able]), restorer)
    done = {mixer.name: pruner.prune(mixer, index, uses[mixer.name].calls) for index, mixer in enumerate(able)}
    return [done.get(mixer.name) or left_as_it_is(mixer, reasons[mixer.name]) for mixer in order]


def _require_one(module: nn.Module, results: Sequence[MixerResult]) -> None:
    """Make sure that some mixer was pruned.

    Raises:
        CheckpointError: saying of each why it was not.
    """
    if all(result.layer is None for result in results):
        kind = type(module).__name__
        listed = "; ".join(f"{result.name or kind} {result.note}" for result in results)
        raise CheckpointError(f"No mixer of this {kind} can be pruned: {listed}.")


def _refuse_unfit(options: dict[str, Any]) -> None:
    """Refuse options that need a checkpoint, or a model of language."""
    if wrong := [name for name in options if name in _OF_A_CHECKPOINT]:
        raise UsageError(
            f"{', '.join(wrong)} does not go with a torch module: it is calibrated on the batches, where it is, and "
            "whole states or channels are removed."
        )
    if wrong := [name for name in options if name in Goal.model_fields]:
        raise UsageError(
            f"{', '.join(wrong)} is for a goal, which only checkpoints can have: the loss of a torch module is not "
            "known. Give a sparsity."
        )
    if "distill" in options:
        raise UsageError(
            "distill does not go with a torch module, which need not predict tokens. Use refine, or train the smaller "
            "module on."
        )


def _configured(module: nn.Module, options: dict[str, Any]) -> CompressConfig:
    """The options, as far as they go with a module.

    Raises:
        UsageError: naming what is wrong.
    """
    _refuse_unfit(options)
    config = configure(model=type(module).__name__, **options)
    able = tuple(PARTS)
    if wrong := [part for part in config.parts if part not in able]:
        raise UsageError(
            f"The pattern {wrong[0]} is not carried out for a torch module; {', '.join((*able, '+'.join(able)))} can "
            "be used."
        )
    if CHANNEL in config.parts and getattr(score(CHANNEL, config.score_of(CHANNEL)), "needs_root", False):
        raise UsageError(
            f"The score {config.score_of(CHANNEL)} weighs errors by what they cost the predictions of a language "
            "model, and a torch module need not have any. Use obs."
        )
    return config


def _plans(config: CompressConfig, mixers: list[Mixer], reasons: dict[str, str]) -> dict[str, Plan]:
    """The plan of each mixer by name; why one has none is added to `reasons`.

    Raises:
        UsageError: the user's own numbers do not fit, or no mixer can be pruned so.
    """
    listed = {name: getattr(config, name) for name in ("states", "widths") if getattr(config, name) is not None}
    for name, numbers in listed.items():
        if len(numbers) != len(mixers):
            raise UsageError(
                f"{name} names {len(numbers)} mixers, the module has {len(mixers)}. Give one number for each."
            )
    plans: dict[str, Plan] = {}
    problems: list[UsageError] = []
    for index, mixer in enumerate(mixers):
        own = config.model_copy(update={name: (numbers[index],) for name, numbers in listed.items()})
        try:
            plans[mixer.name] = _plan(own, mixer)
        except UsageError as error:
            if listed:
                raise
            problems.append(error)
            reasons[mixer.name] = f"is left as it is: {error}"
    if problems and not plans:
        raise problems[0]
    return plans


def _plan(config: CompressConfig, mixer: Mixer) -> Plan:
    """The plan of one mixer.

    Raises:
        UsageError: it cannot be pruned so.
    """
    fixed = mixer.architecture.capabilities.fixed
    able = [part for part, dimension in PARTS.items() if dimension not in fixed]
    if wrong := [part for part in config.parts if part not in able]:
        raise UsageError(
            f"The pattern {wrong[0]} is not carried out for {mixer.family} ({mixer.name}); {', '.join(able)} can be "
            "used."
        )
    check_family(config, mixer.architecture)
    return make_plan(config, mixer.architecture, mixer.dimensions)


def _together(plans: Sequence[Plan]) -> list[Plan]:
    """The plans of several mixers as those of the layers of one model: each has the counts of all."""
    states = tuple(plan.keep.states[0] for plan in plans)
    channels = tuple(plan.keep.channels[0] for plan in plans)
    return [replace(plan, keep=KeepCounts(states, channels)) for plan in plans]


def _ties(module: nn.Module, mixers: Sequence[Mixer], plans: dict[str, Plan]) -> dict[str, str]:
    """Mixers that share a parameter that would change with another part of the module, with the reason to leave them.

    Pruning one of them would prune the other by text that it does not read, or untie the two. Parameters that a plan
    does not touch may be shared: they stay so.
    """
    owners: dict[int, list[str]] = defaultdict(list)  # of each parameter: mixers, and parts outside of any
    for mixer in mixers:
        for parameter in mixer.module.parameters():
            owners[id(parameter)].append(mixer.name)
    inside = {id(part) for mixer in mixers for part in mixer.module.modules()}
    for name, part in module.named_modules():
        for parameter in () if id(part) in inside else part.parameters(recurse=False):
            owners[id(parameter)].append(name)
    reasons = {}
    for mixer in mixers:
        changing = touched(plans[mixer.name])
        for name, parameter in mixer.module.named_parameters():
            others = [owner for owner in owners[id(parameter)] if owner != mixer.name]
            if name in changing and others:
                reasons[mixer.name] = (
                    f"shares {name} with {', '.join(others)}: pruning it would change both or untie them, so it is "
                    "left as it is"
                )
                break
    return reasons


def _tell(module: nn.Module, results: list[MixerResult]) -> Any:
    """Where all mixers had one size and have another now, let the module's configuration say so; how to undo it."""
    sizes = {(m.states, m.channels) for m in results}
    if len(sizes) == 1 and all(m.cuts for m in results):
        return tell_configurations(module, *sizes.pop())
    return None


def _copy(module: nn.Module) -> nn.Module:
    try:
        copied = copy.deepcopy(module)
    except Exception as error:  # whatever a module's own parts raise
        raise UsageError(
            f"This {type(module).__name__} cannot be copied ({type(error).__name__}: {error}). Use in_place=True to "
            "have it changed itself."
        ) from error
    keep_attributes(module, copied)
    return copied


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
