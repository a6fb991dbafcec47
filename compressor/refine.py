"""Refinement: gradient steps on one pruned layer alone, without labels, towards what the dense model makes at its place.

The closed-form repairs move one linear map at a time and leave the states as they are. Here everything behind in_proj
moves together: how fast states decay, what drives and reads them, the convolution, the skip and out_proj. The target is
the dense model's residual stream behind the layer, the input that of the pruned model, so a layer also makes up for
what the layers before it lost. in_proj stays, and so does what was pruned: an entry that is zero remains zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ssmc.runtime.architectures import Architecture
from ssmc.runtime.progress import Progress, silent
from ssmc.runtime.scan import selective_scan

TOKENS = 2048  # of a step, in whole samples
HELD_OUT = 8  # one sample of so many is kept from the steps and judges them
CHECKS = 12  # how often the held-out samples are looked at
PATIENCE = 4  # checks without a better one after which a layer is left
RATE = 0.01  # of a parameter's root mean square a step, at the highest point of the schedule
WARM_UP = 0.1  # of the steps


@dataclass(frozen=True)
class Refinement:
    """What refining a layer achieved; errors are squared, on held-out samples, relative to what the layer should add."""

    steps: int  # that were run
    best_step: int  # whose parameters the layer has now; 0: those it had before
    error_before: float
    error: float


def refine(
    architecture: Architecture,
    block: nn.Module,
    hidden: torch.Tensor,
    stream: torch.Tensor,
    steps: int,
    seed: int,
    progress: Progress = silent,
    label: str = "refining",
) -> Refinement:
    """Refine the mixer of a block in place; never for the worse on the held-out samples.

    Args:
        architecture: adapter of the model.
        block: the pruned and repaired layer.
        hidden: (nsamples, L, d_model) what it reads in the pruned model; at least two samples.
        stream: (nsamples, L, d_model) what the dense layer puts out in the dense model.
        steps: gradient steps, at most.
        seed: of the order of the samples.
        progress: told about steps.
        label: what to call the work.
    """
    task = _Task(architecture, block, hidden, stream)
    held_out = max(1, len(hidden) // HELD_OUT)
    judges, rest = range(len(hidden) - held_out, len(hidden)), len(hidden) - held_out
    batches = _batches(rest, max(1, TOKENS // hidden.shape[1]), seed)
    parameters = _parameters(architecture.mixer(block))
    best = {name: p.detach().clone() for name, p in parameters.items()}
    moves = {name: None if name == "A_log" else p.detach() != 0 for name, p in parameters.items()}
    before = lowest = task.error(judges)
    best_step, since, step = 0, 0, 0
    optimiser = torch.optim.Adam([{"params": [p], "peak": RATE * _size(p)} for p in parameters.values()], lr=0.0)
    every = max(1, steps // CHECKS)
    flags = {name: p.requires_grad for name, p in parameters.items()}
    for step in range(1, steps + 1):
        progress(label, step - 1, steps)
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * _schedule(step, steps)
        task.gradients(next(batches), list(parameters.values()))
        for name, p in parameters.items():
            if moves[name] is not None:
                p.grad *= moves[name]
        optimiser.step()
        if step % every == 0 or step == steps:
            error = task.error(judges)
            since += 1
            if error < lowest:
                lowest, best_step, since = error, step, 0
                best = {name: p.detach().clone() for name, p in parameters.items()}
            if since == PATIENCE or not math.isfinite(error):
                break
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(best[name]).requires_grad_(flags[name]).grad = None
    progress(label, steps, steps)
    return Refinement(step, best_step, before, lowest)


class _Task:
    """The layer, what it reads and what it should add."""

    def __init__(self, architecture: Architecture, block: nn.Module, hidden: torch.Tensor, stream: torch.Tensor):
        self.architecture, self.block, self.hidden, self.stream = architecture, block, hidden, stream

    def _residual(self, samples: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """What the layer adds less what it should add, and the latter, (B, L, d_model)."""
        mixer, hidden = self.architecture.mixer(self.block), self.hidden[samples]
        with torch.no_grad():
            x, z = self.architecture.expand(mixer, self.architecture.normed(self.block, hidden))
        y, _ = selective_scan(self.architecture.scan_inputs(mixer, x, z))
        target = self.stream[samples] - hidden
        return mixer.out_proj(y) - target, target

    def gradients(self, samples: list[int], parameters: list[torch.Tensor]) -> None:
        with torch.enable_grad():
            for p in parameters:
                p.requires_grad_()
            residual, target = self._residual(samples)
            loss = residual.square().sum() / target.square().sum()
            for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                p.grad = g

    @torch.no_grad()
    def error(self, samples: range) -> float:
        wrong = energy = 0.0
        for i in samples:
            residual, target = self._residual([i])
            wrong += float(residual.square().sum(dtype=torch.float64))
            energy += float(target.square().sum(dtype=torch.float64))
        return wrong / energy if energy else 0.0


def _parameters(mixer: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in mixer.named_parameters() if not name.startswith("in_proj")}


def _batches(samples: int, size: int, seed: int) -> Iterator[list[int]]:
    """Samples in random order, each once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < min(size, samples):
            waiting += torch.randperm(samples, generator=generator).tolist()
        yield waiting[: min(size, samples)]
        del waiting[: min(size, samples)]


def _size(parameter: torch.Tensor) -> float:
    """Root mean square of the entries that are not zero."""
    entries = parameter.detach()[parameter.detach() != 0]
    return float(entries.square().mean().sqrt()) if len(entries) else 0.0


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    warm = max(1, round(WARM_UP * steps))
    if step <= warm:
        return step / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm + 1)))
