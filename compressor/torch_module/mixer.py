"""One mixer of a module: pruned on what it reads, then cut to its new size if its own forward takes that."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar, cast

import torch
from torch import nn

from ssmc.compressor.calibration.placement import put, samples
from ssmc.compressor.methods.method import Job, LayerResult, Plan
from ssmc.compressor.methods.registry import score
from ssmc.compressor.methods.states.score import StateScore
from ssmc.compressor.options.config import CompressConfig
from ssmc.compressor.options.patterns import CHANNEL, COLUMN, scores_of
from ssmc.compressor.pipeline import prune_layer
from ssmc.compressor.torch_module.forward import WatchedModule, same
from ssmc.compressor.torch_module.restore import Restorer
from ssmc.runtime.errors import CalibrationError
from ssmc.runtime.models import families
from ssmc.runtime.models.families import Cut
from ssmc.runtime.models.mixers import Mixer, cut_mixer

PARTS = {COLUMN: families.STATE, CHANNEL: families.CHANNEL}
"""What can be cut out of the mixers of a module; other patterns leave zeros or need a language model."""


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


SHARES = "shares parameters with another mixer, so it is left as it is"
"""Why a mixer is left alone whose parameters are all taken to change."""


class _Found(Protocol):
    """A mixer of any kind, as it was found in a module."""

    @property
    def name(self) -> str: ...

    @property
    def module(self) -> nn.Module: ...


AnyMixer = TypeVar("AnyMixer", bound=_Found)


def in_order(mixers: Sequence[AnyMixer], called: Iterable[str]) -> list[AnyMixer]:
    """Mixers in the order of the names that were called; those that never were come last."""
    places = {name: place for place, name in enumerate(called)}
    return sorted(mixers, key=lambda mixer: places.get(mixer.name, len(places)))


def sharing(mixers: Sequence[_Found]) -> set[str]:
    """The names of mixers that have a parameter which another of them has, too."""
    owners: dict[int, set[str]] = defaultdict(set)
    for mixer in mixers:
        for parameter in mixer.module.parameters():
            owners[id(parameter)].add(mixer.name)
    return {name for names in owners.values() if len(names) > 1 for name in names}


def left_as_it_is(mixer: Mixer, reason: str | None) -> MixerResult:
    """A mixer that was not pruned."""
    sizes = mixer.dimensions
    return MixerResult(mixer.name, mixer.family, (sizes.d_state,) * 2, (sizes.d_inner,) * 2, note=reason)


def touched(plan: Plan) -> set[str]:
    """The parameters of a mixer that a plan changes, by name."""
    surgery = plan.architecture.plan
    if plan.carries_out("refine"):
        return set(surgery.tensors)
    wanted = {PARTS[part] for part in plan.config.parts}
    names = {name for name, axes in surgery.tensors.items() if any(part in wanted for parts in axes for part in parts)}
    names |= {"out_proj.weight"} if plan.fits_out_proj else set()
    return names | ({"D"} if plan.has_heads and plan.config.repair else set())  # its skip takes over what was lost


@dataclass(frozen=True)
class MixerPruner:
    """Prunes the mixers of one module, one after the other.

    Attributes:
        watched: the module and its batches.
        plans: of the mixers, in the order in which they are pruned.
        restorer: told how to take back what changes shape.
    """

    watched: WatchedModule
    plans: list[Plan]
    restorer: Restorer | None = None

    def prune(self, mixer: Mixer, index: int, calls: int) -> MixerResult:
        """Prune a mixer in place: silence what goes, then cut it out if the mixer's own forward takes that.

        Args:
            mixer: the mixer.
            index: its place among the plans.
            calls: how often a forward of the module calls it.
        """
        plan, block, label = self.plans[index], mixer.block(), f"mixer {index + 1}/{len(self.plans)}"
        job = Job(plan, block, index, None, label=label, progress=self.watched.progress)
        job.stored_dtypes = {name: tensor.dtype for name, tensor in block.mixer.named_parameters()}
        if plan.needs_text:
            inputs = _Inputs(self.watched, mixer, calls, f"{label}: inputs")
            job.hidden = inputs if _streams(plan) else inputs.together(plan)
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
        masked = self.watched.outputs(mixer, calls)
        gone = f"{states} states" if channels == sizes.d_inner else f"{states} states and {channels} channels"
        silent = "so what was removed is silent and still there"
        try:
            undo = cut_mixer(mixer, layer.states_kept if states < sizes.d_state else None, layer.channels_kept)
        except (AttributeError, TypeError) as error:
            return replace(result, note=f"cannot be told that it has {gone} ({error}), {silent}")
        try:
            problem = None if same(self.watched.outputs(mixer, calls), masked) else "puts out something else"
        except CalibrationError as error:
            problem = f"fails ({error.__cause__})"
        if problem is None:
            if self.restorer is not None:
                self.restorer.remember(undo)
            return replace(result, states=(sizes.d_state, states), channels=(sizes.d_inner, channels), cuts=undo.cuts)
        undo()
        return replace(result, note=f"its own forward {problem} with {gone}, {silent}")


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

    watched: WatchedModule
    mixer: Mixer
    calls: int
    label: str

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self.watched.inputs(self.mixer, self.calls, self.label)

    def together(self, plan: Plan) -> torch.Tensor:
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
                f"one length, or use {_takes_any_length(plan)}."
            )
        return torch.cat(pieces).float()


def _takes_any_length(plan: Plan) -> str:
    """What to change so that the sums are taken batch by batch."""
    changes = [] if plan.config.parts == (COLUMN,) else ['pattern="column"']
    changes += ["refine=0"] if plan.config.refine else []
    changes += ["repair=False"] if plan.has_heads and plan.config.repair else []
    if plan.config.score_of(COLUMN) not in streaming_scores():
        changes.append(f"one of the scores {', '.join(streaming_scores())}")
    return " and ".join(changes)


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
    """What the dense mixer puts out, added to its inputs, as a residual block would: (nsamples, L, d_model)."""
    stream = torch.empty_like(hidden)
    for i, sample in samples(hidden, block.mixer.A_log.device):
        _, y = mixer.architecture.scanned(block, sample)
        put(stream, i, mixer.architecture.output(block, sample, y))
    return stream
