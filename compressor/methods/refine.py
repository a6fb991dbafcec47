"""Refinement: gradient steps on one pruned layer alone, without labels, towards the dense model's output there.

The closed-form repairs move one linear map at a time and leave the states as they are. Here everything in a mixer moves
together: what it reads, how fast states decay, what drives and reads them, the convolution, the skip and out_proj. The
layer reads what it reads in the pruned model and is pulled to the dense model's residual stream behind it, as the last
repair of channel pruning is, so it also makes up for what the layers before it lost. Two things stay as they are: every
weight that is zero (what was pruned stays silent), and a layer that some held-out samples do not find better.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ssmc.compressor.calibration.placement import device_of
from ssmc.runtime.errors import CalibrationError
from ssmc.runtime.models.families import Architecture
from ssmc.runtime.progress import Progress, silent
from ssmc.runtime.scan import ScanInputs

TOKENS = 2048  # of a step, in whole samples: the states then are those the model will have
HELD_OUT = 8  # one sample in so many only judges the steps
CHECKS = 12  # how often they judge, at most
PATIENCE = 6  # judgements without a better layer after which the steps end; the first steps are the largest
RATE = 0.01  # of a tensor's root mean square: how far an entry moves a step at the height of the schedule
WARM_UP = 0.1  # part of the steps


@dataclass(frozen=True)
class Refinement:
    """What refining a layer achieved.

    Errors are squared, on the held-out samples, relative to what the layer should add to the residual stream.
    """

    steps: int  # that were run
    best_step: int  # whose weights the layer has now; 0: those it had before
    error: float
    error_before: float


def stepped_on(samples: int) -> int:
    """How many of the samples, the first ones, steps are taken on; the others judge them."""
    return samples - max(1, samples // HELD_OUT)


def refine(
    architecture: Architecture,
    block: nn.Module,
    hidden: torch.Tensor,
    stream: torch.Tensor,
    steps: int,
    seed: int,
    kept: Sequence[int] | None = None,
    a_log_zeros: bool = False,
    progress: Progress = silent,
    label: str = "refining",
) -> Refinement:
    """Refine the mixer of a block in place; never for the worse on the held-out samples.

    Args:
        architecture: adapter of the model.
        block: the pruned and repaired layer.
        hidden: (nsamples, L, d_model) what it reads in the pruned model; at least two samples.
        stream: (nsamples, L, d_model) what the dense layer puts out in the dense model.
        steps: gradient steps of Adam, at most.
        seed: of the order of the samples.
        kept: the states that are not silent, which alone need to be computed; None: all.
        a_log_zeros: whether zeros of A_log were pruned and stay; else they are decay rates like any other.
        progress: told about steps.
        label: what to call the work.
    """
    layer = _Layer(architecture, block, hidden, stream, kept)
    with layer.trained() as parameters:
        return _descend(layer, parameters, _pinned(parameters, a_log_zeros), steps, seed, progress, label)


def check_samples(tokens: torch.Tensor) -> None:
    """Make sure that some samples can be held out.

    Args:
        tokens: (nsamples, seqlen).

    Raises:
        CalibrationError: there is only one.
    """
    if len(tokens) < 2:
        raise CalibrationError(
            "Refining needs at least 2 calibration samples, as some judge the steps on the others; the text has one of "
            f"{tokens.shape[1]} tokens. Give more text with --calib or use a smaller --seqlen."
        )


def _descend(
    layer: _Layer,
    parameters: Mapping[str, nn.Parameter],
    pinned: Mapping[str, torch.Tensor],
    steps: int,
    seed: int,
    progress: Progress,
    label: str,
) -> Refinement:
    """Adam with a schedule; the parameters end as the best of those that were judged."""
    seen = stepped_on(layer.samples)
    judges = range(seen, layer.samples)
    batches = _batches(seen, max(1, TOKENS // layer.length), seed)
    groups = [{"params": [p], "peak": RATE * _root_mean_square(p)} for p in parameters.values()]
    optimiser = torch.optim.Adam(groups, lr=0.0)
    best, best_step, step = _copies(parameters), 0, 0
    before = lowest = layer.error(judges)
    every = max(1, math.ceil(steps / CHECKS))
    for step in range(1, steps + 1):
        progress(label, step - 1, steps)
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * _schedule(step, steps)
        layer.differentiate(next(batches), parameters)
        for name, entries in pinned.items():
            parameters[name].grad.masked_fill_(entries, 0)
        optimiser.step()
        if step % every and step < steps:
            continue
        error = layer.error(judges)
        if error < lowest:
            best, best_step, lowest = _copies(parameters), step, error
        if not math.isfinite(error) or step - best_step >= PATIENCE * every:
            break
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(best[name])
    progress(label, steps, steps)
    return Refinement(step, best_step, lowest, before)


class _Layer:
    """A layer, what it reads, and what it should put out."""

    def __init__(
        self,
        architecture: Architecture,
        block: nn.Module,
        hidden: torch.Tensor,
        stream: torch.Tensor,
        kept: Sequence[int] | None,
    ):
        self._architecture, self._block, self._kept = architecture, block, kept
        self._mixer = architecture.mixer(block)
        self._hidden, self._stream = hidden, stream
        self.samples, self.length, _ = hidden.shape

    @contextmanager
    def trained(self) -> Iterator[dict[str, nn.Parameter]]:
        """The mixer's parameters, with gradients inside the block; those of the rest of the layer have none."""
        flags = {p: p.requires_grad for p in self._block.parameters()}
        moving = dict(self._mixer.named_parameters())
        try:
            for parameter in flags:
                parameter.requires_grad_(any(parameter is p for p in moving.values()))
            yield moving
        finally:
            for parameter, flag in flags.items():
                parameter.grad = None
                parameter.requires_grad_(flag)

    def differentiate(self, samples: Sequence[int], parameters: Mapping[str, nn.Parameter]) -> None:
        """Fill in the gradients of the relative error on some samples."""
        with torch.enable_grad():
            wrong, energy = self._squares(samples)
            relative = wrong / energy.clamp(min=torch.finfo(energy.dtype).tiny)
            gradients = torch.autograd.grad(relative, [*parameters.values()])
        for parameter, gradient in zip(parameters.values(), gradients, strict=True):
            parameter.grad = gradient

    @torch.no_grad()
    def error(self, samples: Sequence[int]) -> float:
        """The relative error on some samples, one of them at a time."""
        squares = [[float(s) for s in self._squares([i])] for i in samples]
        wrong, energy = (sum(column) for column in zip(*squares, strict=True))
        return wrong / energy if energy > 0 else 0.0

    def _squares(self, samples: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Squares of what the layer adds amiss and of what it should add, summed."""
        device = device_of(self._block)
        hidden, stream = (t[list(samples)].to(device) for t in (self._hidden, self._stream))
        expanded = self._architecture.expand(self._mixer, self._architecture.normed(self._block, hidden))
        inputs = self._architecture.scan_inputs(self._mixer, *expanded)
        if self._kept is not None and isinstance(inputs, ScanInputs):
            inputs = inputs.some_states(self._kept)
        y, _ = self._architecture.scan(self._mixer, inputs)
        added = self._mixer.out_proj(y)  # (B, L, d_model)
        wanted = (stream - hidden)[..., : added.shape[2]]
        return (added - wanted).square().sum(), wanted.square().sum()


def _pinned(parameters: Mapping[str, torch.Tensor], a_log_zeros: bool) -> dict[str, torch.Tensor]:
    """Entries that stay zero, by parameter."""
    return {name: p.detach() == 0 for name, p in parameters.items() if a_log_zeros or name != "A_log"}


def _copies(parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in parameters.items()}


def _batches(samples: int, size: int, seed: int) -> Iterator[list[int]]:
    """Samples in random order, each once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    size, waiting = min(size, samples), []
    while True:
        while len(waiting) < size:
            waiting += torch.randperm(samples, generator=generator).tolist()
        yield waiting[:size]
        del waiting[:size]


def _root_mean_square(parameter: torch.Tensor) -> float:
    """Of the entries that are not zero."""
    entries = parameter.detach()[parameter.detach() != 0]
    return float(entries.square().mean().sqrt()) if len(entries) else 0.0


def _schedule(step: int, steps: int) -> float:
    """Up in a straight line, then down half a cosine."""
    rising = max(1, round(WARM_UP * steps))
    if step <= rising:
        return step / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising + 1)))
