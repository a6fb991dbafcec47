"""A goal for a hybrid: search over all of its axes, show the best candidates, carry one of them out.

What each axis costs alone is measured at two shares on a few samples, the losses are taken to add up, and everything a
loader takes is enumerated. The candidates with the least loss are listed; the first few are tried for real, unless the
user names one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from statistics import median
from typing import Any

import torch
from torch import nn

from ssmc.compressor.calibration.placement import Stage
from ssmc.compressor.calibration.split import Samples
from ssmc.compressor.foreseen import Refusal
from ssmc.compressor.options.config import CompressConfig
from ssmc.compressor.options.goal import Goal
from ssmc.compressor.pipeline import Run, prune
from ssmc.compressor.plan import make_plan
from ssmc.compressor.search.allocation import ROUNDS, Curve, Limit, cheapest_within, frontier
from ssmc.compressor.search.carry_out import ATTEMPTS, Distil, GoalResult
from ssmc.compressor.search.configured import configured
from ssmc.compressor.search.counting import require_one
from ssmc.compressor.search.hybrid_latency import KindTable, measure_kinds, read_kind_table
from ssmc.compressor.search.hybrid_sizes import HybridSizes, Removed
from ssmc.compressor.search.outcome import Losses, above, after_steps, missed
from ssmc.runtime.device import choose_device
from ssmc.runtime.errors import SsmcError, UsageError, VerificationError
from ssmc.runtime.measure.latency import Workload
from ssmc.runtime.measure.perplexity import losses_of_tokens
from ssmc.runtime.measure.timing import Ratio, interleave, paired_ratio
from ssmc.runtime.models.checkpoints import Checkpoint
from ssmc.runtime.models.consumers import misfit
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.progress import NO_PROGRESS, Progress

SWEEP = (0.25, 0.5)  # where the axes' curves are measured, roughly
TRIED = 3  # candidates that are tried for real
SHOWN = 10  # candidates that are listed
REPEATS, BUDGET = 15, 60.0  # rounds in which the outcome and the dense model are timed, and seconds for all of them
TIMED = 15.0  # seconds of timing for candidates beside the dense model, a guide


def counted_limits(sizes: HybridSizes, goal: Goal) -> list[Limit]:
    """Those of a goal that need no clock."""
    wanted = goal.target_params
    return [] if wanted is None else [Limit("parameters", sizes.share_of_parameters, wanted)]


def check_goal(checkpoint: Checkpoint, config: CompressConfig, goal: Goal) -> None:
    """Refuse, before any work, what counting alone shows to be out of reach, and a table that is for something else.

    Raises:
        UsageError: naming the least that can be reached.
    """
    sizes = HybridSizes(checkpoint, config.parts, config.runtime, config.round_to)
    limits = counted_limits(sizes, goal)
    if goal.needs_time and goal.latency_table is not None:
        workload = Workload(goal.phase, goal.batch, goal.length)
        table = read_kind_table(goal.latency_table, sizes, workload, choose_device(config.device))
        if goal.target_latency is not None:
            limits.append(Limit("time", table.ratio, goal.target_latency))
    require_within(checkpoint, config, sizes.candidates(), limits)


def require_within(
    checkpoint: Checkpoint, config: CompressConfig, candidates: Sequence[Removed], limits: Sequence[Limit]
) -> None:
    """Refuse limits that no candidate is within.

    Raises:
        UsageError: naming the least that can be reached.
    """
    if limits:
        able = HybridSizes(checkpoint, runtime=config.runtime, round_to=config.round_to).axes
        require_one(config, candidates, limits, able)


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
        refuse: configurations that do not run where the result is for.
    """

    checkpoint: Checkpoint
    config: CompressConfig
    goal: Goal
    tokens: torch.Tensor
    device: torch.device
    progress: Progress = NO_PROGRESS
    refuse: Refusal | None = None
    losses: dict[Removed, float] = field(default_factory=dict)
    clocked: dict[Removed, Ratio] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rounding = self.config.round_to
        self.sizes = HybridSizes(self.checkpoint, self.config.parts, self.config.runtime, rounding)
        self._known: dict[Removed, bool] = {}  # which ones run where the result is for
        self.samples = Samples.split(self.tokens, self.config.nsamples)
        self.workload = Workload(self.goal.phase, self.goal.batch, self.goal.length)
        limits = counted_limits(self.sizes, self.goal)
        if not any(self.runs(r) for r in self._candidates if all(limit.allows(r) for limit in limits)):
            raise self._nothing_runs()
        given = self.goal.latency_table
        self.table: KindTable | None = None
        if self.goal.needs_time and given is not None:
            self.table = read_kind_table(given, self.sizes, self.workload, self.device)
        self.base = self._losses(self.checkpoint.model)
        if self.goal.needs_time and given is None:
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
        """The candidates that meet the goal and lose least, those with the least loss first; for a bound of the loss
        alone the fastest that is within it, and others that are expected to be, the fastest first.

        Raises:
            UsageError: there is none.
            VerificationError: nothing that was tried is within the bound.
        """
        limits = self._limits()
        if not limits:
            within = [r for r in self._candidates if self.expected(r) <= self.goal.most_nats]
            ranked = sorted(within, key=lambda removed: (self.share_of_time(removed), removed))
            return self._different([self._fastest(), *ranked])
        require_within(self.checkpoint, self.config, self._candidates, limits)
        able = [r for r in self._candidates if all(limit.allows(r) for limit in limits)]
        return self._different(sorted(able, key=lambda removed: (self.expected(removed), removed)))

    def set_right(self) -> None:
        """Time the likeliest candidates before any of them is pruned, and correct the table by what shows.

        A table that the user gave is taken at its word, so that the search comes to the same end again.
        """
        if self.goal.target_latency is None or self.goal.latency_table is not None:
            return
        for _ in range(ROUNDS):
            new = [removed for removed in self.best()[:TRIED] if removed not in self.clocked]
            if not new:
                return
            assert self.table is not None
            self.clocked |= self._clock(new, TIMED)
            factors = [ratio.median / self.table.added_up(removed) for removed, ratio in self.clocked.items()]
            self.table = replace(self.table, correction=median(factors))

    def _fastest(self) -> Removed:
        """The fastest within the bound of the loss, by bisection along what nothing beats in both time and loss."""
        ordered = frontier(self._candidates, self.share_of_time, self.expected, self.runs)
        if not ordered:
            raise self._nothing_runs()
        bound = self.goal.most_nats
        start = next((i for i, removed in enumerate(ordered) if self.expected(removed) <= bound), len(ordered) - 1)
        found = cheapest_within(ordered, self.try_out, bound, start)
        if found is None:
            least = math.expm1(min(self.losses.values()))
            raise VerificationError(
                f"Nothing that was tried keeps the perplexity within {self.goal.max_ppl_increase:.2%} of the dense "
                f"model's on held-out calibration text (the least was {least:.2%}), so nothing was written. Allow more."
            )
        return found

    def runs(self, removed: Removed) -> bool:
        """Whether what is left runs where the result is for."""
        runtime = self.config.runtime
        if runtime is not None and removed not in self._known:
            architecture, left = self.checkpoint.architecture, self.sizes.smaller(removed)
            self._known[removed] = misfit(runtime, architecture.dimensions(left)) is None
            try:
                if self.refuse is not None:
                    self.refuse(architecture, left)
            except SsmcError:
                self._known[removed] = False
        return self._known.get(removed, True)

    def _different(self, ranked: Sequence[Removed]) -> list[Removed]:
        """The first of a ranking that run and really differ: in two axes at least, or in one by more than an eighth.

        Raises:
            UsageError: none of them runs.
        """
        found: list[Removed] = []
        for removed in ranked:
            if all(_distance(removed, other) > 0.13 for other in found) and self.runs(removed):
                found.append(removed)
            if len(found) == SHOWN:
                break
        if not found:
            raise self._nothing_runs()
        return found

    def _nothing_runs(self) -> UsageError:
        return UsageError(
            f"Nothing that meets the goal with --pattern {self.config.pattern} runs in {self.config.runtime}. Ask for "
            "less, or leave out --for."
        )

    @cached_property
    def _candidates(self) -> list[Removed]:
        return self.sizes.candidates()

    def try_out(self, removed: Removed) -> float:
        """Prune a copy of the model on a few samples and measure its excess loss on held-out ones, nats a token."""
        if removed not in self.losses:
            run = configured(self.config, removed.by_axis, trial=True)
            model, _, _ = self._prune(run, self.samples.fit)
            self.losses[removed] = above(self._losses(model), self.base)["excess_nats"]
        return self.losses[removed]

    def carry_out(self, removed: Removed, record: dict[str, Any], distil: Distil | None = None) -> GoalResult:
        """The whole run that leaves these sizes, and what came of it.

        Raises:
            VerificationError: it raises the perplexity by more than the bound.
        """
        run = configured(self.config, removed.by_axis)
        model, plan, pruned = self._prune(run, self.tokens[: self.config.nsamples])
        loss, done = above(self._losses(model), self.base), None
        self.losses[removed] = loss["excess_nats"]  # should the search go on, it knows better than from a trial
        if distil is not None:
            done = distil(replace(self.checkpoint, model=model.cpu()), pruned.layers)
            loss = after_steps(done, loss["excess_nats"])
        outcome: dict[str, Any] = {"parameters": self.sizes.share_of_parameters(removed), **loss}
        if self.goal.needs_time:
            ratio = self._clock([removed], BUDGET)[removed]
            outcome |= {"time": ratio.median, "time_low": ratio.low, "time_high": ratio.high}
        lacks = missed(outcome, self.goal, self.goal.most_nats)
        if loss["excess_nats"] > self.goal.most_nats:
            raise VerificationError(f"{lacks[0]} Nothing was written. Allow more, or ask for less.")
        notes = (*lacks, *self.samples.notes)
        return GoalResult(plan, model.cpu(), pruned, record | {"outcome": outcome}, notes, done)

    def _limits(self) -> list[Limit]:
        limits, wanted = counted_limits(self.sizes, self.goal), self.goal.target_latency
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

    def _losses(self, model: nn.Module) -> Losses:
        held = self.samples.held_out
        return losses_of_tokens(use_fast_scan(model.to(self.device)), held.reshape(-1), held.shape[1])

    def _clock(self, several: Sequence[Removed], budget: float) -> dict[Removed, Ratio]:
        """Times of stock models of these sizes over the dense one's, in turns, within about so many seconds."""
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        models: dict[Removed | None, nn.Module] = {None: self.checkpoint.model}
        for done, removed in enumerate(several):
            self.progress("timing candidates", done, len(several))
            smaller = AutoModelForCausalLM.from_config(self.sizes.smaller(removed), dtype=torch.float32).eval()
            models[removed] = use_fast_scan(smaller.to(self.device))
        runs = {removed: self.workload.on(model) for removed, model in models.items()}
        prepare = runs if self.workload.phase == "decode" else None
        timings = interleave(runs, self.device, REPEATS, budget, calls=self.workload.calls, prepare=prepare)
        return {removed: paired_ratio(timings[removed], timings[None]) for removed in several}


def reach_goal_of_hybrid(
    checkpoint: Checkpoint,
    config: CompressConfig,
    goal: Goal,
    tokens: torch.Tensor,
    device: torch.device,
    progress: Progress = NO_PROGRESS,
    *,
    distil: Distil | None = None,
    refuse: Refusal | None = None,
) -> GoalResult:
    """Search the axes of a hybrid for a goal and carry out the best, or the candidate that the user names.

    Arguments and errors as of `carry_out.reach_goal`; candidates that `refuse` refuses are left out.
    """
    checkpoint.model.to(device)
    search = HybridSearch(checkpoint, config, goal, tokens, device, progress, refuse)
    search.set_right()
    tried = set[Removed]()
    while True:
        found = search.best()
        chosen = _chosen(search, found)
        tried.add(chosen)
        try:
            return search.carry_out(chosen, _record(search, found, chosen), distil)
        except VerificationError:
            if goal.candidate or not goal.only_loss or distil or len(tried) == ATTEMPTS or search.best()[0] in tried:
                raise


def _chosen(search: HybridSearch, found: Sequence[Removed]) -> Removed:
    """The candidate that the user names, or the best."""
    goal = search.goal
    if goal.candidate is not None:
        if goal.candidate > len(found):
            raise UsageError(f"There are {len(found)} candidates, so there is no candidate {goal.candidate}.")
        chosen = found[goal.candidate - 1]
        search.try_out(chosen)
        return chosen
    if goal.only_loss:
        return found[0]
    return min(found[:TRIED], key=lambda removed: (search.try_out(removed), removed))


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
        "clocked": [{"removed": r.by_axis, "time": asdict(ratio)} for r, ratio in search.clocked.items()],
        "held_out_seen": search.samples.seen,
        "latency_table": None if search.table is None else search.table.to_json(),
    }


def _distance(one: Removed, other: Removed) -> float:
    """The sum over axes of how much more of it is gone."""
    first, second = one.by_axis, other.by_axis
    return sum(abs(first.get(axis, 0) - second.get(axis, 0)) for axis in {*first, *second})
