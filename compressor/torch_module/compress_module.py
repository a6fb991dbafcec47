"""Any torch module: its Mamba and Mamba-2 mixers are pruned, calibrated by running the module itself.

A language model is walked block by block (`pipeline`). Of any other module only the mixers are known, so what a mixer
reads is found by running the whole module on the user's batches up to it, the mixers before it being pruned already.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from ssmc.compressor.calibration.placement import put, samples
from ssmc.compressor.families import check_family
from ssmc.compressor.methods.method import Job, KeepCounts, LayerResult, Plan
from ssmc.compressor.methods.registry import score
from ssmc.compressor.methods.states.score import StateScore
from ssmc.compressor.options.config import CompressConfig, configure
from ssmc.compressor.options.patterns import CHANNEL, COLUMN, scores_of
from ssmc.compressor.pipeline import prune_layer
from ssmc.compressor.plan import make_plan
from ssmc.compressor.torch_module.forward import Forward, Runs, Seen, evaluating, run_on, same
from ssmc.runtime.errors import CalibrationError, CheckpointError, UsageError
from ssmc.runtime.models import families
from ssmc.runtime.models.families import Cut
from ssmc.runtime.models.mixers import Mixer, cut_mixer, find_mixers, tell_configurations
from ssmc.runtime.models.stock_kernels import guard_kernels
from ssmc.runtime.progress import NO_PROGRESS, Progress

PARTS = {COLUMN: families.STATE, CHANNEL: families.CHANNEL}
"""What can be cut out of the mixers of a module; other patterns leave zeros or need a language model."""

_OF_A_CHECKPOINT: tuple[str, ...] = ("model", "calib", "nsamples", "seqlen", "tokenizer", "device")
_OF_A_CHECKPOINT += ("target", "scope", "ffn_score", "alpha")


@dataclass(frozen=True)
class MixerResult:
    """What happened to one mixer of a module."""

    name: str
    family: str  # the `model_type` of language models with such mixers
    states: tuple[int, int]  # of a group, before and after
    channels: tuple[int, int]  # d_inner before and after
    layer: LayerResult | None = None  # which states and channels stayed, and at what error; None: it was not pruned
    cuts: tuple[Cut, ...] = ()  # tensors that got smaller
    note: str | None = None  # why it was left as it is, or why what was removed is silent in place of gone


@dataclass(frozen=True)
class CompressedModule:
    """What `compress_module` did."""

    module: nn.Module
    config: CompressConfig
    mixers: tuple[MixerResult, ...]  # in the order they run
    parameters: tuple[int, int]  # before and after

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know: mixers that were left as they are, or did not get smaller."""
        return tuple(f"{mixer.name}: {mixer.note}" for mixer in self.mixers if mixer.note)


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
    """Prune the Mamba and Mamba-2 mixers of a module, whatever it is for, and cut them to their new size.

    A mixer is known by the names and shapes of its parameters (those of transformers, mamba_ssm and mamba-minimal) and
    by its own forward, which must put out on the first batch what this structure says. Each is pruned on what it reads
    when the module runs on the batches with the mixers before it pruned. With `repair`, the C rows of a Mamba-1 are
    mixed; the rest is fitted to what the dense mixer makes of the same input.

    Memory does not grow with the number of batches for the pattern column of a Mamba-1 by `streaming_scores`;
    otherwise what one mixer reads is kept, and then all sequences must have one length. Batches are run once for each
    mixer that needs them, up to that mixer.

    Args:
        module: any torch module; in eval mode while it is run.
        batches: what to run it on: an iterable that can be read several times, such as a list or a DataLoader.
        in_place: change `module` itself; by default a copy is made and `module` stays as it is. After an error a module
            changed in place may be pruned in part.
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
    before = _parameters(module)
    find_mixers(guard_kernels(module))  # before a copy of something big
    work = module if in_place else _copy(module)
    with evaluating(work):
        runs = Runs(work, batches, forward, progress)
        mixers = find_mixers(work)
        progress("looking at the mixers", 0, 1)
        seen = runs.look(mixers)
        order = sorted(mixers, key=lambda m: [*seen, m.name].index(m.name))
        able = [mixer for mixer in order if _reason(seen.get(mixer.name)) is None]
        if not able:
            reasons = "; ".join(
                f"{mixer.name or type(mixer.module).__name__} {_reason(seen.get(mixer.name))}" for mixer in order
            )
            raise CheckpointError(f"No mixer of this {type(module).__name__} can be pruned: {reasons}.")
        pruner = _Pruner(runs, seen, _plans(config, able))
        done = {mixer.name: pruner.prune(mixer, index) for index, mixer in enumerate(able)}
    if set(done) == {mixer.name for mixer in mixers}:
        _tell(work, list(done.values()))
    results = [done.get(mixer.name) or _left(mixer, _reason(seen.get(mixer.name))) for mixer in order]
    return CompressedModule(work, config, tuple(results), (before, _parameters(work)))


def _configured(module: nn.Module, options: dict[str, Any]) -> CompressConfig:
    """The options, as far as they go with a module.

    Raises:
        UsageError: naming what is wrong.
    """
    if wrong := [name for name in options if name in _OF_A_CHECKPOINT]:
        raise UsageError(
            f"{', '.join(wrong)} does not go with a torch module: it is calibrated on the batches, where it is, and "
            "whole states or channels are removed."
        )
    config = configure(model=type(module).__name__, **options)
    able = tuple(PARTS)
    if wrong := [part for part in config.parts if part not in able]:
        raise UsageError(
            f"The pattern {wrong[0]} is not carried out for a torch module; {', '.join((*able, '+'.join(able)))} can "
            "be used."
        )
    return config


def _reason(seen: Seen | None) -> str | None:
    """Why a mixer is left as it is; None: it is not."""
    if seen is None:
        return "was not called on the first batch"
    if not seen.reads_sequences:
        return "was called without a (B, L, d_model) tensor"
    if not seen.finite:
        raise CalibrationError(
            "The module puts out NaN or infinity on the first batch. Check the batches and the module, or compute in "
            "float32."
        )
    if not seen.agrees:
        return (
            "has the parameters of a Mamba, but its forward computes something else (a norm on B, C or dt, a second "
            "direction, a cache)"
        )
    return None


def _plans(config: CompressConfig, mixers: list[Mixer]) -> list[Plan]:
    """The plan of each mixer; all of them have the counts of all mixers.

    Raises:
        UsageError: the numbers do not fit, or the pattern does not fit a family.
    """
    listed = {name: getattr(config, name) for name in ("states", "widths") if getattr(config, name) is not None}
    for name, numbers in listed.items():
        if len(numbers) != len(mixers):
            raise UsageError(
                f"{name} names {len(numbers)} mixers, the module has {len(mixers)}. Give one number for each."
            )
    plans = []
    for index, mixer in enumerate(mixers):
        fixed = mixer.architecture.capabilities.fixed
        able = [part for part, dimension in PARTS.items() if dimension not in fixed]
        if wrong := [part for part in config.parts if part not in able]:
            raise UsageError(
                f"The pattern {wrong[0]} is not carried out for {mixer.family} ({mixer.name}); "
                f"{', '.join(able)} can be used."
            )
        check_family(config, mixer.architecture)
        own = config.model_copy(update={name: (numbers[index],) for name, numbers in listed.items()})
        plans.append(make_plan(own, mixer.architecture, mixer.dimensions))
    states = tuple(plan.keep.states[0] for plan in plans)
    channels = tuple(plan.keep.channels[0] for plan in plans)
    return [replace(plan, config=config, keep=KeepCounts(states, channels)) for plan in plans]


@dataclass(frozen=True)
class _Pruner:
    """What the mixers of one run have in common."""

    runs: Runs
    seen: dict[str, Seen]
    plans: list[Plan]

    def prune(self, mixer: Mixer, index: int) -> MixerResult:
        """Prune a mixer in place: silence what goes, then cut it out if the mixer's own forward takes that."""
        plan, block, label = self.plans[index], mixer.block(), f"mixer {index + 1}/{len(self.plans)}"
        calls = self.seen[mixer.name].calls
        job = Job(plan, block, index, None, label=label, progress=self.runs.progress)
        job.stored_dtypes = {name: tensor.dtype for name, tensor in block.mixer.named_parameters()}
        if plan.needs_text:
            inputs = _Inputs(self.runs, mixer, calls, f"{label}: inputs")
            job.hidden = inputs if _streams(plan) else inputs.together()
        if plan.follows_dense:
            _check_sequences(plan.config, job.samples)
            job.stream = _stream(mixer, block, job.samples)
        prune_layer(job)
        return self._cut(mixer, job.result(), calls)

    def _cut(self, mixer: Mixer, layer: LayerResult, calls: int) -> MixerResult:
        """Cut out what is silent, unless the mixer's own forward then fails or puts out something else."""
        sizes, groups = mixer.dimensions, mixer.dimensions.groups
        states, channels = len(layer.states_kept) // groups, len(layer.channels_kept or range(sizes.d_inner))
        result = MixerResult(mixer.name, mixer.family, (sizes.d_state,) * 2, (sizes.d_inner,) * 2, layer)
        masked = self.runs.outputs(mixer, calls)
        undo = cut_mixer(mixer, layer.states_kept if states < sizes.d_state else None, layer.channels_kept)
        try:
            problem = None if same(self.runs.outputs(mixer, calls), masked) else "puts out something else"
        except CalibrationError as error:
            problem = f"fails ({error.__cause__})"
        if problem is None:
            return replace(result, states=(sizes.d_state, states), channels=(sizes.d_inner, channels), cuts=undo.cuts)
        undo()
        gone = f"{states} states" if channels == sizes.d_inner else f"{states} states and {channels} channels"
        note = f"its own forward {problem} with {gone}, so what was removed is silent and still there"
        return replace(result, note=note)


def _streams(plan: Plan) -> bool:
    """Whether the sums can be taken batch by batch."""
    if plan.follows_dense or plan.config.parts != (COLUMN,) or (plan.has_heads and plan.config.repair):
        return False
    return cast(StateScore, score(COLUMN, plan.config.score_of(COLUMN))).streams


def streaming_scores() -> tuple[str, ...]:
    """Scores of states whose sums take one batch after the other."""
    return tuple(name for name in scores_of(COLUMN) if cast(StateScore, score(COLUMN, name)).streams)


@dataclass(frozen=True)
class _Inputs:
    """What a mixer reads, found anew each time it is asked for."""

    runs: Runs
    mixer: Mixer
    calls: int
    label: str

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self.runs.inputs(self.mixer, self.calls, self.label)

    def together(self) -> torch.Tensor:
        """All of it, (nsamples, L, d_model).

        Raises:
            CalibrationError: the sequences have several lengths.
        """
        pieces = list(self)
        lengths = sorted({piece.shape[1] for piece in pieces})
        if len(lengths) > 1:
            raise CalibrationError(
                f"{self.mixer.name or 'The mixer'} reads sequences of several lengths "
                f"({', '.join(map(str, lengths))}), and this score or repair needs all of one length. Give batches of "
                f"one length, or use the pattern column on a Mamba-1 with one of {', '.join(streaming_scores())}."
            )
        return torch.cat(pieces).float()


def _check_sequences(config: CompressConfig, hidden: torch.Tensor) -> None:
    """Make sure that some sequences can judge the refinement on the others.

    Raises:
        CalibrationError: there is only one.
    """
    if config.refine and len(hidden) < 2:
        raise CalibrationError(
            "Refining needs at least 2 sequences, as some judge the steps on the others; the batches have one."
        )


def _stream(mixer: Mixer, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """What the dense mixer makes of its inputs, added to them, as a residual block would: (nsamples, L, d_model)."""
    stream = torch.empty_like(hidden)
    for i, sample in samples(hidden, block.mixer.A_log.device):
        _, y = mixer.architecture.scanned(block, sample)
        put(stream, i, mixer.architecture.output(block, sample, y))
    return stream


def _tell(module: nn.Module, results: list[MixerResult]) -> None:
    """Where all mixers had one size and have another now, let the module's configuration say so."""
    sizes = {(m.states, m.channels) for m in results}
    if len(sizes) == 1 and all(m.cuts for m in results):
        tell_configurations(module, *sizes.pop())


def _left(mixer: Mixer, reason: str | None) -> MixerResult:
    """A mixer that was not pruned."""
    sizes = mixer.dimensions
    return MixerResult(mixer.name, mixer.family, (sizes.d_state,) * 2, (sizes.d_inner,) * 2, note=reason)


def _copy(module: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(module)
    except Exception as error:  # whatever a module's own parts raise
        raise UsageError(
            f"This {type(module).__name__} cannot be copied ({type(error).__name__}: {error}). Use in_place=True to "
            "have it changed itself."
        ) from error


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
