"""Pruning the states of one layer, with their repair, or single entries of its A_log."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch

from ssmc.compressor.methods.method import Job, Record
from ssmc.compressor.methods.registry import score
from ssmc.compressor.methods.states.c_rows import fit_c_rows
from ssmc.compressor.methods.states.collect import collect
from ssmc.compressor.methods.states.contributions import Loss, loss_of
from ssmc.compressor.methods.states.elimination import evaluate
from ssmc.compressor.methods.states.normed import remove_states
from ssmc.compressor.methods.states.score import ScoredGroup, StateScore
from ssmc.compressor.methods.states.statistics import Statistic
from ssmc.compressor.methods.states.sums import STATISTICS, Request
from ssmc.compressor.options.patterns import COLUMN
from ssmc.runtime.collectives import of_all
from ssmc.runtime.models.architectures.interface import HeadReaders

# A_log of a state without memory. A = -e^12 = -162755: exp(dt A) is 0 in float32 from dt = 6e-4 on and below 1e-7 from
# dt = 1e-4 on; with shorter steps next to nothing is written into the state either. A larger number would cost the sums
# of dt A, of whose differences chunked scans of Mamba-2 make decays, their precision. Half precision holds it exactly.
FORGET = 12.0


@dataclass(frozen=True)
class StatesRecord(Record):
    """What removing states costs: squared errors of the gated output, relative to it."""

    name = "states"

    error: float | None = None  # None: nothing was measured
    error_unrepaired: float | None = None
    repaired: bool = False
    norm_spread: float | None = None  # how far the norms of B and C vary from token to token; None: there are none

    def as_manifest(self) -> dict[str, Any]:
        """The errors, and whether there was a repair."""
        found = {"repaired": self.repaired, "error": self.error, "error_unrepaired": self.error_unrepaired}
        return found | ({} if self.norm_spread is None else {"norm_spread": self.norm_spread})


@dataclass(frozen=True)
class EntriesRecord(Record):
    """What became of A_log."""

    name = "entries"

    pruned: float  # part of A_log that was pruned: is 0 now, or FORGET

    def as_manifest(self) -> dict[str, Any]:
        """The part of A_log that was pruned, under the name it had when that meant 0."""
        return {"a_log_zeros": self.pruned}


def prune_states(job: Job) -> None:
    """Remove states of one layer, of each of its groups by itself, and repair what folds into its weights."""
    architecture, mixer, config = job.architecture, job.mixer, job.config
    keep, kept, loss = job.plan.keep.states[job.index], [], Loss()
    mixing, record = None, StatesRecord()
    for number, states in enumerate(_group_sizes(job)):
        group = scored_group(job, number, COLUMN, keep)
        chosen = state_score(job, COLUMN).choose(group, keep)
        kept += [number * states + state for state in chosen]
        if normal := group.sums.get("normal"):
            repair = evaluate(normal.dense(), chosen, config.repair)
            mixing, record = repair.mixing, StatesRecord(repair.error, repair.error_unrepaired, config.repair)
        if group.sums.get("contributions"):
            loss += _lose(job, number, group, chosen)
            record = StatesRecord(*loss.relative(), config.repair)
    if architecture.capabilities.normed_readers and job.hidden is not None:
        fit = remove_states(architecture, job.work, job.samples, kept, mixing, config.repair)
        record = StatesRecord(fit.error, fit.error_unrepaired, config.repair, fit.spread)
    else:
        architecture.mask_states(mixer, kept, mixing)
    job.states_kept = tuple(kept)
    job.note(record)


def _lose(job: Job, number: int, group: ScoredGroup, chosen: list[int]) -> Loss:
    """What a group of heads loses, once its C rows are refitted to make up for it if that was asked for."""
    sums = group.sums["contributions"]
    removed = sorted(set(range(group.A_log.shape[1])) - set(chosen))
    loss = loss_of(sums, removed, job.config.repair)
    if grams := group.sums.get("readout-grams"):
        fit = fit_c_rows(job, number, grams, chosen)
        cast("HeadReaders", job.architecture).change_skip(job.mixer, number, fit.skip_change)
        # both on the same held-out stretches
        loss = Loss(fit.error * loss.energy, fit.error_before * loss.energy, loss.energy)
    return loss


def prune_entries(job: Job) -> None:
    """Set entries of A_log to 0 or to `FORGET`, in a Mamba-2 those of whole heads."""
    config, A_log = job.config, job.mixer.A_log
    part, keep = config.pattern, job.plan.keep.states[job.index]
    groups = [scored_group(job, number, part, keep) for number in range(len(_group_sizes(job)))]
    sparsity, judge = config.nm or config.sparsity_of(part), state_score(job, part)
    if job.plan.has_heads:
        A_log.copy_(prune_heads(judge, groups, A_log, sparsity))
    else:
        A_log.copy_(judge.pruned_entries(groups[0], sparsity))
    pruned = A_log == 0
    if config.pruned_entry == "forget":
        A_log.masked_fill_(pruned, FORGET)
    job.note(EntriesRecord(float(pruned.sum()) / A_log.numel()))


def prune_heads(judge: StateScore, groups: list[ScoredGroup], A_log: torch.Tensor, sparsity: Any) -> torch.Tensor:
    """A Mamba-2's A_log (H,) with entries set to 0, that is A = -1, one number for all channels and states of a head.

    Args:
        judge: the score; a head has the sum over what it says of its entries.
        groups: of the layer.
        A_log: (H,).
        sparsity: over all heads, or N:M along neighbouring ones.
    """
    from ssmc.compressor.methods.states.ranking import entry_mask

    importance = judge.of_heads(groups, len(A_log) // len(groups))
    return A_log * entry_mask(importance.to(A_log.device), sparsity)


def state_score(job: Job, part: str) -> StateScore:
    """The score that decides about states or entries of this run."""
    return cast(StateScore, score(part, job.config.score_of(part)))


def scored_group(job: Job, number: int, part: str, keep: int) -> ScoredGroup:
    """One group of a layer with what its score, and the repair, want to know."""
    config, rates = job.config, job.architecture.rates(job.mixer)
    heads = len(job.mixer.A_log) // len(rates) if job.plan.has_heads else None
    count, length = job.hidden.shape[:2] if isinstance(job.hidden, torch.Tensor) else (0, 0)
    request = Request(config, rates[number], keep, length, of_all(count), heads)
    sums = state_score(job, part).statistics(request)
    if part == COLUMN and config.repair:
        sums = _repair_statistics(request) | sums
    collect(job, list(sums.values()), number, weights=job.prepared.get("states"))
    return ScoredGroup(job.index, rates[number].detach().clone(), sums, config.repair, config.seed)


def _repair_statistics(request: Request) -> dict[str, Statistic]:
    names = ("normal",) if request.heads is None else ("contributions", "readout-grams")
    return {name: STATISTICS[name](request) for name in names}


def _group_sizes(job: Job) -> list[int]:
    """States of each group of a layer."""
    return [rates.shape[1] for rates in job.architecture.rates(job.mixer)]
