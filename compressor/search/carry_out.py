"""A run with a target: search, carry out what was found, measure what came of it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ssmc.compressor.calibration.split import Samples
from ssmc.compressor.options.config import CompressConfig
from ssmc.compressor.options.goal import Target
from ssmc.compressor.prune import Pruned, prune
from ssmc.compressor.search.allocation import Sizes
from ssmc.compressor.search.layer_sizes import Layerwise
from ssmc.compressor.search.trials import Search
from ssmc.runtime.errors import VerificationError
from ssmc.runtime.models.checkpoints import Checkpoint
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.progress import Progress, silent

ATTEMPTS = 3  # whole runs, where the outcome is not what was looked for


@dataclass(frozen=True)
class Met:
    """A model that meets a target."""

    config: CompressConfig  # the ordinary run that gives the same model
    model: nn.Module
    pruned: Pruned
    record: dict[str, Any]  # for the manifest: what was asked, expected and came out
    notes: tuple[str, ...]  # in what the target was missed, and what its figures lack


def meet(
    checkpoint: Checkpoint,
    config: CompressConfig,
    target: Target,
    tokens: torch.Tensor,
    samples: Samples,
    device: torch.device,
    progress: Progress = silent,
) -> Met:
    """Search, carry out what was found, measure what came of it, and search on where it is not what was asked for.

    Args:
        checkpoint: the dense model, with the fast scan in use; it ends on the device, and is not changed else.
        config: what may be removed and how, its sparsity aside.
        target: what to meet.
        tokens: (nsamples, seqlen) calibration samples of the whole run.
        samples: text for trials.
        device: where to compute and to measure.
        progress: told about the steps.

    Raises:
        UsageError: nothing meets the target, by the latency table and by counting.
        VerificationError: what meets it raises the perplexity by more than the bound.
    """
    checkpoint.model.to(device)
    search = Search(checkpoint, config, target, samples, progress)
    done: set[Sizes | Layerwise] = set()
    for _ in range(ATTEMPTS):
        found = search.run()
        if found.sizes in done:
            break
        done.add(found.sizes)
        model = use_fast_scan(copy.deepcopy(checkpoint.model).cpu())
        text = tokens if found.config.needs_text else None
        pruned = prune(model, checkpoint.architecture, text, found.config, checkpoint.dtypes, device, progress)
        outcome = search.outcome(model, found)
        missed = search.missed(outcome)
        met = Met(found.config, model.cpu(), pruned, {**found.record, "outcome": outcome}, (*missed, *samples.notes))
        if not missed:
            break
    if met.record["outcome"]["excess_nats"] > target.most_nats:
        raise VerificationError(f"{met.notes[0]} Nothing was written. Allow more, or ask for less speed.")
    return met
