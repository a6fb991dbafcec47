"""A run with a goal: find sizes, carry them out, measure what came of it, and search on where that is not the goal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ssmc.compressor.calibration.split import Samples
from ssmc.compressor.distillation.steps import Distillation
from ssmc.compressor.methods.method import LayerResult, Plan
from ssmc.compressor.options.config import CompressConfig
from ssmc.compressor.options.goal import Goal
from ssmc.compressor.pipeline import Pruned, prune
from ssmc.compressor.plan import make_plan
from ssmc.compressor.search.allocation import Sizes
from ssmc.compressor.search.find import find_sizes
from ssmc.compressor.search.layer_sizes import Layerwise
from ssmc.compressor.search.outcome import after_steps, missed
from ssmc.compressor.search.trials import Trials
from ssmc.runtime.errors import VerificationError
from ssmc.runtime.models.checkpoints import Checkpoint
from ssmc.runtime.progress import NO_PROGRESS, Progress

Distil = Callable[[Checkpoint, Sequence[LayerResult]], Distillation]
"""Takes gradient steps on a checkpoint with a masked model, in place, given what happened to its layers."""

ATTEMPTS = 3  # whole runs, where the outcome is not what was looked for


@dataclass(frozen=True)
class GoalResult:
    """The model that came nearest to a goal."""

    plan: Plan  # of the ordinary run that gives the same model
    model: nn.Module
    pruned: Pruned
    record: dict[str, Any]  # for the manifest: what was asked, expected and came out
    notes: tuple[str, ...]  # in what the goal was missed, and what its figures lack
    distillation: Distillation | None = None


def reach_goal(
    checkpoint: Checkpoint,
    config: CompressConfig,
    goal: Goal,
    tokens: torch.Tensor,
    device: torch.device,
    progress: Progress = NO_PROGRESS,
    *,
    distil: Distil | None = None,
) -> GoalResult:
    """Search, carry out what was found, measure what came of it, and search on where it is not what was asked for.

    The best outcome of all attempts is handed back, whichever attempt it was.

    Args:
        checkpoint: the dense model, with the fast scan in use; it ends on the device, and is not changed else.
        config: what may be removed and how, its sparsity aside.
        goal: what to meet.
        tokens: (n, seqlen) calibration samples: the whole run takes the first `nsamples`, trials some of all.
        device: where to compute and to measure.
        progress: told about the steps.
        distil: takes gradient steps on what comes out, in place; the bound of the perplexity is then judged after them.

    Raises:
        UsageError: nothing meets the goal, by the latency table and by counting.
        VerificationError: what meets it raises the perplexity by more than the bound.
    """
    checkpoint.model.to(device)
    samples = Samples.split(tokens, config.nsamples)
    trials = Trials(checkpoint, config, goal, samples, progress)
    bound = goal.most_nats if distil is None else math.inf
    done: set[Sizes | Layerwise] = set()
    best: GoalResult | None = None
    for _ in range(ATTEMPTS):
        found = find_sizes(trials)
        if found.sizes in done and best is not None:
            break
        done.add(found.sizes)
        plan = make_plan(found.config, checkpoint.architecture, trials.dense, checkpoint.config)
        model = trials.copy_of_dense()
        text = tokens[: config.nsamples] if plan.needs_text else None
        pruned = prune(trials.run_of(model, plan, text, progress))
        outcome = trials.outcome(model, found.sizes)
        lacks, record = missed(outcome, goal, bound), {**found.record, "outcome": outcome}
        result = GoalResult(plan, model.cpu(), pruned, record, (*lacks, *samples.notes))
        if best is None or trials.shortfall(outcome, bound) < trials.shortfall(best.record["outcome"], bound):
            best = result
        if not lacks:
            break
    assert best is not None
    if distil is not None:
        best = _distilled(best, trials, distil)
    if best.record["outcome"]["excess_nats"] > goal.most_nats:
        raise VerificationError(f"{best.notes[0]} Nothing was written. Allow more, or ask for less speed.")
    return best


def _distilled(result: GoalResult, trials: Trials, distil: Distil) -> GoalResult:
    """The same model after gradient steps, and what it loses then."""
    done = distil(replace(trials.checkpoint, model=result.model), result.pruned.layers)
    before = result.record["outcome"]
    outcome = {**before, **after_steps(done, before["excess_nats"])}
    notes = (*missed(outcome, trials.goal, trials.goal.most_nats), *trials.samples.notes)
    record = {**result.record, "outcome": outcome}
    return replace(result, model=result.model.cpu(), record=record, notes=notes, distillation=done)
