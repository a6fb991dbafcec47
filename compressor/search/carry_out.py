"""A run with a goal: find sizes, carry them out, measure what came of it, and search on where that is not the goal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ssmc.compressor.calibration.placement import Stage
from ssmc.compressor.calibration.split import Samples
from ssmc.compressor.methods.method import Plan
from ssmc.compressor.options.config import CompressConfig
from ssmc.compressor.options.goal import Goal
from ssmc.compressor.pipeline import Pruned, Run, prune
from ssmc.compressor.plan import make_plan
from ssmc.compressor.search.allocation import Sizes
from ssmc.compressor.search.find import find_sizes
from ssmc.compressor.search.layer_sizes import Layerwise
from ssmc.compressor.search.trials import Trials
from ssmc.runtime.errors import VerificationError
from ssmc.runtime.models.checkpoints import Checkpoint
from ssmc.runtime.progress import NO_PROGRESS, Progress

ATTEMPTS = 3  # whole runs, where the outcome is not what was looked for


@dataclass(frozen=True)
class GoalResult:
    """The model that came nearest to a goal."""

    plan: Plan  # of the ordinary run that gives the same model
    model: nn.Module
    pruned: Pruned
    record: dict[str, Any]  # for the manifest: what was asked, expected and came out
    notes: tuple[str, ...]  # in what the goal was missed, and what its figures lack


def reach_goal(
    checkpoint: Checkpoint,
    config: CompressConfig,
    goal: Goal,
    tokens: torch.Tensor,
    device: torch.device,
    progress: Progress = NO_PROGRESS,
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

    Raises:
        UsageError: nothing meets the goal, by the latency table and by counting.
        VerificationError: what meets it raises the perplexity by more than the bound.
    """
    checkpoint.model.to(device)
    samples = Samples.split(tokens, config.nsamples)
    trials = Trials(checkpoint, config, goal, samples, progress)
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
        pruned = prune(Run(model, plan, text, checkpoint.dtypes, Stage(device), progress))
        outcome = trials.outcome(model, found.sizes)
        missed, record = trials.missed(outcome), {**found.record, "outcome": outcome}
        result = GoalResult(plan, model.cpu(), pruned, record, (*missed, *samples.notes))
        if best is None or trials.shortfall(outcome) < trials.shortfall(best.record["outcome"]):
            best = result
        if not missed:
            break
    assert best is not None
    if best.record["outcome"]["excess_nats"] > goal.most_nats:
        raise VerificationError(f"{best.notes[0]} Nothing was written. Allow more, or ask for less speed.")
    return best
