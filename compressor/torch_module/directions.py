"""States of mixers that scan in several directions: of each reader those it can do without best, by its own C rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from ssmc.compressor.methods.method import Job, LayerResult
from ssmc.compressor.methods.states.prune import StatesRecord
from ssmc.compressor.options.config import CompressConfig
from ssmc.compressor.options.patterns import COLUMN
from ssmc.compressor.pipeline import prune_layer
from ssmc.compressor.plan import make_plan
from ssmc.compressor.torch_module.forward import Call, Use, WatchedModule, close, same
from ssmc.compressor.torch_module.mixer import SHARES, MixerResult, in_order, sharing, streaming_scores
from ssmc.compressor.torch_module.restore import Restorer
from ssmc.runtime.errors import CalibrationError, UsageError
from ssmc.runtime.models.directions import (
    DIRECTION,
    DirectionalMixer,
    Reader,
    cut_directions,
    put_out,
    read_by,
    readers,
)

_WANTED = "a tensor of sequences, or of images with channels last"
_OTHERWISE = (
    "has the parameters of several directions, but its forward computes something else than Vim or SS2D do (another "
    "order, norm or gate)"
)


def check_directions(config: CompressConfig) -> None:
    """Refuse what does not go with mixers of several directions, before any work.

    Raises:
        UsageError: naming what can be used.
    """
    if config.parts != (COLUMN,) or config.refine or config.states is not None:
        raise UsageError(
            "Of mixers that scan in several directions states are removed by a sparsity, without gradient steps. Use "
            "the pattern column, and leave refine and states out."
        )
    if config.score_of(COLUMN) not in streaming_scores():
        raise UsageError(
            f"The score {config.score_of(COLUMN)} needs the sequences of a mixer all together. For mixers that scan in "
            f"several directions use {', '.join(streaming_scores())}."
        )


@torch.no_grad()
def prune_directions(
    watched: WatchedModule, mixers: Sequence[DirectionalMixer], config: CompressConfig, restorer: Restorer | None
) -> list[MixerResult]:
    """Prune mixers of several directions in place, in the order they are first called.

    Args:
        watched: the module and its batches.
        mixers: in it.
        config: the run.
        restorer: told how to take changes of shape back.
    """
    uses = watched.look(mixers, _agreement)
    order, shared = in_order(mixers, uses), sharing(mixers)
    done = []
    for index, mixer in enumerate(order):
        result = MixerResult(mixer.name, mixer.kind, (mixer.states,) * 2, (mixer.d_inner,) * 2)
        note = uses.get(mixer.name, Use()).reason_to_leave(_WANTED, _OTHERWISE)
        if note is None and mixer.name in shared:
            note = SHARES
        if note is not None:
            done.append(replace(result, note=note))
            continue
        calls, label = uses[mixer.name].calls, f"mixer {index + 1}/{len(order)}"
        done.append(_prune(watched, mixer, config, restorer, result, calls, index, label))
    return done


def _agreement(mixer: DirectionalMixer) -> Callable[[Call, torch.Tensor], bool]:
    return lambda call, own: close(own, put_out(mixer, call.hidden))


@dataclass(frozen=True)
class _Pieces:
    """What a reader reads, found anew each time it is asked for: (B, L, 2 D + 1)."""

    watched: WatchedModule
    mixer: DirectionalMixer
    number: int  # of the reader
    calls: int
    label: str

    def __iter__(self) -> Iterator[torch.Tensor]:
        for hidden in self.watched.inputs(self.mixer, self.calls, self.label):
            yield from read_by(self.mixer, readers(self.mixer, hidden.shape)[self.number], hidden)


def _prune(
    watched: WatchedModule,
    mixer: DirectionalMixer,
    config: CompressConfig,
    restorer: Restorer | None,
    result: MixerResult,
    calls: int,
    index: int,
    label: str,
) -> MixerResult:
    """Silence states of every reader, then cut them out if the mixer's own forward takes that."""
    plan = make_plan(config, DIRECTION, DIRECTION.dimensions(mixer.sizes))
    found: list[LayerResult] = []
    for number, reader in enumerate(_readers(watched, mixer, calls)):
        block = nn.Module()
        block.mixer = reader.view
        job = Job(plan, block, 0, None, label=label, progress=watched.progress)
        job.stored_dtypes = {name: tensor.dtype for name, tensor in reader.view.named_parameters()}
        if plan.needs_text:
            job.hidden = _Pieces(watched, mixer, number, calls, f"{label}: inputs")
        prune_layer(job)
        found.append(job.result())
    kept = [layer.states_kept for layer in found]
    numbered = tuple(number * mixer.states + n for number, stay in enumerate(kept) for n in stay)
    result = replace(result, layer=LayerResult(numbered, None, (_mean([layer.states for layer in found]),)))
    masked, left = watched.outputs(mixer, calls), len(kept[0])
    silent = "so what was removed is silent and still there"
    try:
        undo = cut_directions(mixer, kept)
    except (AttributeError, TypeError) as error:
        return replace(result, note=f"cannot be told that it has {left} states ({error}), {silent}")
    try:
        problem = None if same(watched.outputs(mixer, calls), masked) else "puts out something else"
    except CalibrationError as error:
        problem = f"fails ({error.__cause__})"
    if problem is not None:
        undo()
        return replace(result, note=f"its own forward {problem} with {left} states, {silent}")
    if restorer is not None:
        restorer.remember(undo)
    return replace(result, states=(mixer.states, left), cuts=undo.cuts)


def _readers(watched: WatchedModule, mixer: DirectionalMixer, calls: int) -> list[Reader]:
    """The readers of a mixer, whose views do not depend on the size of an image."""
    return readers(mixer, next(iter(watched.inputs(mixer, calls, "inputs"))).shape)


def _mean(records: Sequence[StatesRecord]) -> StatesRecord:
    """The record of all readers together."""

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None

    errors, unrepaired = mean([r.error for r in records]), mean([r.error_unrepaired for r in records])
    return StatesRecord(errors, unrepaired, all(record.repaired for record in records))
