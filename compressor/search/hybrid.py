"""A goal for a hybrid: search over all of its axes, show the best candidates, carry one of them out.

What each axis costs alone is measured at two shares on a few samples, the losses are taken to add up, and everything a
loader takes is enumerated. The candidates with the least loss are listed; the first few are tried for real, unless the
user names one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ssmc.compressor.calibration.placement import Stage
from ssmc.compressor.calibration.split import Samples
from ssmc.compressor.options.config import CompressConfig
from ssmc.compressor.options.goal import Goal
from ssmc.compressor.pipeline import Run, prune
from ssmc.compressor.plan import make_plan
from ssmc.compressor.search.allocation import Curve, Limit, cheapest_within
from ssmc.compressor.search.carry_out import Distil, GoalResult
from ssmc.compressor.search.configured import configured
from ssmc.compressor.search.counting import require_one
from ssmc.compressor.search.hybrid_latency import KindTable, measure_kinds
from ssmc.compressor.search.hybrid_sizes import HybridSizes, Removed
from ssmc.compressor.search.outcome import of_loss, rose_too_much
from ssmc.runtime.errors import UsageError, VerificationError
from ssmc.runtime.measure.latency import Workload
from ssmc.runtime.measure.perplexity import Perplexity, excess_loss, perplexity
from ssmc.runtime.measure.timing import interleave, paired_ratio
from ssmc.runtime.models.checkpoints import Checkpoint
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.progress import NO_PROGRESS, Progress

SWEEP = (0.25, 0.5)  # where the axes' curves are measured, roughly
TRIED = 3  # candidates that are tried for real
SHOWN = 10  # candidates that are listed
REPEATS, BUDGET = 15, 60.0  # rounds in which the outcome and the dense model are timed, and seconds for all of them


@dataclass
class HybridSearch:
    """A search over the axes of a hybrid.

    Attributes:
        checkpoint: the dense model, with the fast scan in use, on the device; it is not changed.
        config: what may be removed and how, its sparsity aside.
        goal: what to meet.
        tokens: (n, seqlen) calibration samples.
        device: where to compute and to measure.
        progress: told about the steps.
    """

    checkpoint: Checkpoint
    config: CompressConfig
    goal: Goal
    tokens: torch.Tensor
    device: torch.device
    progress: Progress = NO_PROGRESS
    losses: dict[Removed, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sizes = HybridSizes(self.checkpoint, self.config.parts, self.config.runtime)
        self.samples = Samples.split(self.tokens, self.config.nsamples)
        self.workload = Workload(self.goal.phase, self.goal.batch, self.goal.length)
        self._require(self._counted_limits())  # at once
        self.base = self._perplexity(self.checkpoint.model)
        self.table: KindTable | None = None
        if self.goal.needs_time:
            self.table = measure_kinds(self.sizes, self.workload, self.device, self.progress)
        self.curves = {axis: self._curve(axis) for axis in self.sizes.axes}

    def expected(self, removed: Removed) -> float:
        """Excess loss in nats a token, added up."""
        return sum(self.curves[axis].at(share) for axis, share in removed.shares)

    def share_of_time(self, removed: Removed) -> float:
        """Time over the dense model's, by the table."""
        assert self.table is not None
        return self.table.ratio(removed)

    def best(self) -> list[Removed]:
        """The candidates that meet the goal and lose least, those with the least loss first.

        Raises:
            UsageError: there is none.
        """
        found, limits = self.sizes.candidates(), self._limits()
        if limits:
            self._require(limits)
            able = [r for r in found if all(limit.allows(r) for limit in limits)]
            ranked = sorted(able, key=lambda removed: (self.expected(removed), removed))
        else:
            within = [r for r in found if self.expected(r) <= self.goal.most_nats]
            ranked = sorted(within or found, key=lambda removed: (self.share_of_time(removed), removed))
        return _different(ranked, SHOWN)

    def try_out(self, removed: Removed) -> float:
        """Prune a copy of the model on a few samples and measure its excess loss on held-out ones, nats a token."""
        if removed not in self.losses:
            run = configured(self.config, removed.by_axis, trial=True)
            model, _, _ = self._prune(run, self.samples.fit)
            self.losses[removed] = excess_loss(self._perplexity(model), self.base).nats
        return self.losses[removed]

    def carry_out(self, removed: Removed, record: dict[str, Any], distil: Distil | None = None) -> GoalResult:
        """The whole run that leaves these sizes, and what came of it.

        Raises:
            VerificationError: it raises the perplexity by more than the bound.
        """
        run = configured(self.config, removed.by_axis)
        model, plan, pruned = self._prune(run, self.tokens[: self.config.nsamples])
        loss, done, before = excess_loss(self._perplexity(model), self.base), None, {}
        if distil is not None:
            before = {"excess_before_steps": loss.nats}
            done = distil(replace(self.checkpoint, model=model.cpu()), pruned.layers)
            loss = excess_loss(self._perplexity(model), self.base)
        outcome: dict[str, Any] = {
            "parameters": self.sizes.share_of_parameters(removed),
            **of_loss(loss),
            **before,
        }
        if self.goal.needs_time:
            outcome |= self._clock(removed)
        if loss.nats > self.goal.most_nats:
            reason = rose_too_much(outcome, self.goal)
            raise VerificationError(f"{reason} Nothing was written. Allow more, or ask for less.")
        return GoalResult(plan, model.cpu(), pruned, record | {"outcome": outcome}, tuple(self.samples.notes), done)

    def _require(self, limits: Sequence[Limit]) -> None:
        """Refuse limits that no candidate is within."""
        if limits:
            able = HybridSizes(self.checkpoint, runtime=self.config.runtime).axes
            require_one(self.config, self.sizes.candidates(), limits, able)

    def _counted_limits(self) -> list[Limit]:
        """Those that need no clock."""
        wanted = self.goal.target_params
        return [] if wanted is None else [Limit("parameters", self.sizes.share_of_parameters, wanted)]

    def _limits(self) -> list[Limit]:
        limits, wanted = self._counted_limits(), self.goal.target_latency
        return limits if wanted is None else [*limits, Limit("time", self.share_of_time, wanted)]

    def _curve(self, axis: str) -> Curve:
        """The loss of removing from one axis alone, measured at two shares."""
        levels = self.sizes.alone(axis)
        points = dict.fromkeys(min(levels, key=lambda share: abs(share - wanted)) for wanted in SWEEP)
        return Curve.through({share: self.try_out(Removed(((axis, share),))) for share in points})

    def _prune(self, run: CompressConfig, text: torch.Tensor) -> tuple[nn.Module, Any, Any]:
        checkpoint, model = self.checkpoint, use_fast_scan(copy.deepcopy(self.checkpoint.model).cpu())
        plan = make_plan(run, checkpoint.architecture, checkpoint.dimensions, checkpoint.config)
        name = f"trial {len(self.losses) + 1}"
        told = lambda _, done, total: self.progress(name, done, total)  # noqa: E731
        pruned = prune(Run(model, plan, text, checkpoint.dtypes, Stage(self.device), told))
        return model, plan, pruned

    def _perplexity(self, model: nn.Module) -> Perplexity:
        held = self.samples.held_out
        return perplexity(use_fast_scan(model.to(self.device)), held.reshape(-1), held.shape[1])

    def _clock(self, removed: Removed) -> dict[str, float]:
        """Time of a stock model of these sizes over the dense one's, in turns."""
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        smaller = AutoModelForCausalLM.from_config(self.sizes.smaller(removed), dtype=torch.float32).eval()
        models = {"dense": self.checkpoint.model, "smaller": use_fast_scan(smaller.to(self.device))}
        runs = {name: self.workload.on(model) for name, model in models.items()}
        prepare = runs if self.workload.phase == "decode" else None
        timings = interleave(runs, self.device, REPEATS, BUDGET, calls=self.workload.calls, prepare=prepare)
        ratio = paired_ratio(timings["smaller"], timings["dense"])
        return {"time": ratio.median, "time_low": ratio.low, "time_high": ratio.high}


def reach_goal_of_hybrid(
    checkpoint: Checkpoint,
    config: CompressConfig,
    goal: Goal,
    tokens: torch.Tensor,
    device: torch.device,
    progress: Progress = NO_PROGRESS,
    *,
    distil: Distil | None = None,
) -> GoalResult:
    """Search the axes of a hybrid for a goal and carry out the best, or the candidate that the user names.

    Arguments and errors as of `carry_out.reach_goal`.
    """
    checkpoint.model.to(device)
    search = HybridSearch(checkpoint, config, goal, tokens, device, progress)
    found = search.best()
    if goal.candidate is not None:
        if goal.candidate > len(found):
            raise UsageError(f"There are {len(found)} candidates, so there is no candidate {goal.candidate}.")
        chosen = found[goal.candidate - 1]
        search.try_out(chosen)
    elif goal.target_latency is None and goal.target_params is None:
        chosen = cheapest_within(found, search.try_out, goal.most_nats, 0) or found[-1]
        search.try_out(chosen)
    else:
        chosen = min(found[:TRIED], key=lambda removed: (search.try_out(removed), removed))
    return search.carry_out(chosen, _record(search, found, chosen), distil)


def _record(search: HybridSearch, found: Sequence[Removed], chosen: Removed) -> dict[str, Any]:
    """Everything a search decided on, for the manifest."""
    expected = {
        "parameters": search.sizes.share_of_parameters(chosen),
        "excess_nats": search.losses[chosen],
    }
    if search.table is not None:
        expected["time"] = search.share_of_time(chosen)
    candidates = [
        {
            "removed": removed.by_axis,
            "parameters": search.sizes.share_of_parameters(removed),
            "time": None if search.table is None else search.share_of_time(removed),
            "added_up_nats": search.expected(removed),
            "excess_nats": search.losses.get(removed),
        }
        for removed in found
    ]
    return {
        "asked": search.goal.model_dump(mode="json", exclude={"latency_table"}),
        "sizes": chosen.by_axis,
        "chosen": found.index(chosen) + 1,
        "expected": expected,
        "candidates": candidates,
        "curves": {a: {"shares": list(c.shares), "losses": list(c.losses)} for a, c in search.curves.items()},
        "held_out_seen": search.samples.seen,
        "latency_table": None if search.table is None else search.table.to_json(),
    }


def _different(ranked: Sequence[Removed], count: int) -> list[Removed]:
    """The first of a ranking that really differ: in two axes at least, or in one by more than an eighth."""
    found: list[Removed] = []
    for removed in ranked:
        if all(_distance(removed, other) > 0.13 for other in found):
            found.append(removed)
        if len(found) == count:
            break
    return found


def _distance(one: Removed, other: Removed) -> float:
    """The sum over axes of how much more of it is gone."""
    first, second = one.by_axis, other.by_axis
    return sum(abs(first.get(axis, 0) - second.get(axis, 0)) for axis in {*first, *second})
