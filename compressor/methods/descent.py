"""The one training loop: Adam on a few tensors, with a schedule, judged now and then; the best of those stays."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ssmc.runtime.progress import NO_PROGRESS, Progress

WARM_UP = 0.1  # part of the steps


@dataclass(frozen=True)
class Pace:
    """How fast and how long.

    Attributes:
        steps: at most.
        rates: how far an entry of each tensor moves a step at the height of the schedule.
        checks: how often the steps are judged, at most.
        patience: judgements without a better one after which the steps end; None: never.
        constant: all steps at the height of the schedule; else up in a straight line, then down half a cosine.
    """

    steps: int
    rates: Sequence[float]
    checks: int = 12
    patience: int | None = None
    constant: bool = False

    def at(self, step: int) -> float:
        """The height of the schedule at a step, counted from 1."""
        if self.constant:
            return 1.0
        rising = max(1, round(WARM_UP * self.steps))
        if step <= rising:
            return step / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / (self.steps - rising + 1)))


@dataclass(frozen=True)
class Descent:
    """What came of it."""

    steps: int  # that were run
    best_step: int  # whose values the tensors have now; 0: those they had before
    error: float  # as it was judged
    error_before: float


def descend(
    tensors: Sequence[torch.Tensor],
    gradients: Callable[[], Sequence[torch.Tensor]],
    judge: Callable[[], float] | None,
    pace: Pace,
    progress: Progress = NO_PROGRESS,
    label: str = "steps",
) -> Descent:
    """Take steps of Adam on tensors, in place.

    Args:
        tensors: what moves; leaves of autograd.
        gradients: their gradients now, on samples that it chooses anew each time.
        judge: the error on samples that no step sees; None: nothing is judged and the last step stays.
        pace: how fast and how long.
        progress: told about steps.
        label: what to call the work.
    """
    groups = [{"params": [t], "peak": rate} for t, rate in zip(tensors, pace.rates, strict=True)]
    optimiser = torch.optim.Adam(groups, lr=0.0)
    best, best_step, step = _copies(tensors), 0, 0
    before = lowest = math.nan if judge is None else judge()
    every = max(1, math.ceil(pace.steps / pace.checks))
    for step in range(1, pace.steps + 1):
        progress(label, step - 1, pace.steps)
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * pace.at(step)
        for tensor, gradient in zip(tensors, gradients(), strict=True):
            tensor.grad = gradient
        optimiser.step()
        if judge is None or (step % every and step < pace.steps):
            continue
        error = judge()
        if error < lowest:
            best, best_step, lowest = _copies(tensors), step, error
        if not math.isfinite(error) or (pace.patience is not None and step - best_step >= pace.patience * every):
            break
    if judge is not None:
        with torch.no_grad():
            for tensor, value in zip(tensors, best, strict=True):
                tensor.copy_(value)
    progress(label, pace.steps, pace.steps)
    return Descent(step, best_step, lowest, before)


def batches(samples: int, size: int, seed: int) -> Iterator[list[int]]:
    """Numbers of samples in random order, each once before any comes again.

    Args:
        samples: how many there are.
        size: how many at a time.
        seed: of the order.
    """
    generator = torch.Generator().manual_seed(seed)
    size = min(size, samples)
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += torch.randperm(samples, generator=generator).tolist()
        yield waiting[:size]
        del waiting[:size]


def root_mean_square(tensor: torch.Tensor) -> float:
    """Of the entries of a tensor."""
    return float(tensor.detach().float().square().mean().sqrt()) if tensor.numel() else 0.0


def _copies(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in tensors]
