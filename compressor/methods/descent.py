"""The one training loop: gradient steps with a schedule, judged now and then; the best of what was judged stays."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ssmc.runtime.progress import NO_PROGRESS, Progress

WARM_UP = 0.1  # part of the steps
WORSE = 1.5  # times the least error so far: what is judged to be above it has diverged


@dataclass(frozen=True)
class Pace:
    """How fast and how long.

    Attributes:
        steps: at most.
        rates: how far an entry of each tensor moves a step at the height of the schedule.
        checks: how often the steps are judged, at most.
        patience: judgements without a better one after which the steps end; None: never.
        constant: all steps at the height of the schedule; else up in a straight line, then down half a cosine.
        backs_off: steps that diverge are undone, and those that follow are half as large; else steps end there.
    """

    steps: int
    rates: Sequence[float]
    checks: int = 12
    patience: int | None = None
    constant: bool = False
    backs_off: bool = False

    @property
    def every(self) -> int:
        """Steps between two judgements."""
        return max(1, math.ceil(self.steps / self.checks))

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


class Optimiser(Protocol):
    """What `descend` asks of an optimiser; those of torch are."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of parameters, each with its "lr"."""

    def step(self) -> Any:
        """Move the parameters along their gradients."""

    def state_dict(self) -> dict[str, Any]:
        """All that it remembers."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what another remembered."""


MakeOptimiser = Callable[[list[dict[str, Any]]], Optimiser]
"""Makes an optimiser of groups {"params": [tensor], "peak": rate}; their "lr" is set before each step."""


def adam(groups: list[dict[str, Any]]) -> Optimiser:
    """Adam with its usual averages."""
    return torch.optim.Adam(groups, lr=0.0)


@dataclass
class _Standing:
    """How far a descent has come, beside the tensors themselves."""

    step: int = 0
    best_step: int = 0
    error: float = math.nan
    error_before: float = math.nan
    height: float = 1.0  # of the schedule, halved when steps diverge
    best: list[torch.Tensor] = field(default_factory=list)


def descend(
    tensors: Sequence[torch.Tensor],
    gradients: Callable[[], Sequence[torch.Tensor]],
    judge: Callable[[], float] | None,
    pace: Pace,
    progress: Progress = NO_PROGRESS,
    label: str = "steps",
    *,
    optimiser: MakeOptimiser = adam,
    before: float | None = None,
    start: Mapping[str, Any] | None = None,
    keep: Callable[[dict[str, Any]], None] | None = None,
) -> Descent:
    """Take gradient steps on tensors, in place.

    Args:
        tensors: what moves; leaves of autograd.
        gradients: their gradients now, on samples that it chooses anew each time.
        judge: the error on samples that no step sees; None: nothing is judged and the last step stays.
        pace: how fast and how long.
        progress: told about steps.
        label: what to call the work.
        optimiser: makes what takes the steps.
        before: what `judge` gives before the first step, where that is known already.
        start: what `keep` was given last, to go on there. The caller sees to it that `gradients` goes on with the
            samples after those of the steps that were taken, `start["step"]`.
        keep: is given the state after every judgement: numbers and tensors, in lists and dicts, by name.
    """
    walk = _Walk(tensors, optimiser, pace)
    if start is not None:
        walk.go_on(start)
    elif judge is not None:
        walk.now.error = walk.now.error_before = judge() if before is None else before
    while walk.now.step < pace.steps:
        progress(label, walk.now.step, pace.steps)
        walk.take_step(gradients)
        if judge is None or (walk.now.step % pace.every and walk.now.step < pace.steps):
            continue
        if not walk.judged(judge()):
            break
        if keep is not None and walk.now.step < pace.steps:
            keep(walk.state())
    if judge is not None:
        walk.return_to_best()
    progress(label, pace.steps, pace.steps)
    return Descent(walk.now.step, walk.now.best_step, walk.now.error, walk.now.error_before)


class _Walk:
    """Tensors on their way down."""

    def __init__(self, tensors: Sequence[torch.Tensor], optimiser: MakeOptimiser, pace: Pace):
        self._tensors, self._make, self._pace = tensors, optimiser, pace
        self._optimiser = self._new()
        self.now = _Standing(best=_copies(tensors))

    def take_step(self, gradients: Callable[[], Sequence[torch.Tensor]]) -> None:
        self.now.step += 1
        for group in self._optimiser.param_groups:
            group["lr"] = group["peak"] * self.now.height * self._pace.at(self.now.step)
        for tensor, gradient in zip(self._tensors, gradients(), strict=True):
            tensor.grad = gradient
        self._optimiser.step()

    def judged(self, error: float) -> bool:
        """Take note of the error now; whether to go on."""
        now, pace = self.now, self._pace
        if error < now.error:
            now.best, now.best_step, now.error = _copies(self._tensors), now.step, error
        elif pace.backs_off and not error <= WORSE * now.error:
            self.return_to_best()
            now.height /= 2
            self._optimiser = self._new()
            return True
        late = pace.patience is not None and now.step - now.best_step >= pace.patience * pace.every
        return math.isfinite(error) and not late

    def return_to_best(self) -> None:
        with torch.no_grad():
            for tensor, value in zip(self._tensors, self.now.best, strict=True):
                tensor.copy_(value)

    def state(self) -> dict[str, Any]:
        """All that is needed to go on later."""
        return {**vars(self.now), "tensors": _copies(self._tensors), "optimiser": self._optimiser.state_dict()}

    def go_on(self, state: Mapping[str, Any]) -> None:
        """Take up what an earlier run left."""
        self.now = _Standing(**{name: state[name] for name in vars(self.now)})
        with torch.no_grad():
            for tensor, value in zip(self._tensors, state["tensors"], strict=True):
                tensor.copy_(value)
        self._optimiser.load_state_dict(state["optimiser"])

    def _new(self) -> Optimiser:
        pairs = zip(self._tensors, self._pace.rates, strict=True)
        return self._make([{"params": [tensor], "peak": rate} for tensor, rate in pairs])


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
