"""Refinement: gradient steps on one pruned layer alone, without labels, towards the dense model's output there.

The closed-form repairs move one linear map at a time and leave the states as they are. Here everything in a mixer moves
together: what it reads, how fast states decay, what drives and reads them, the convolution, the skip and out_proj. The
layer reads what it reads in the pruned model and is pulled to the dense model's residual stream behind it, as the last
repair of channel pruning is, so it also makes up for what the layers before it lost. Two things stay as they are: every
weight that is zero (what was pruned stays silent), and a layer that some held-out samples do not find better.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ssmc.compressor.calibration.placement import computing, device_of
from ssmc.compressor.methods.channels.out_proj import fit_out_proj
from ssmc.compressor.methods.descent import Pace, batches, descend
from ssmc.compressor.methods.gradients import hold, only_these_move
from ssmc.compressor.methods.method import Job, Record
from ssmc.runtime.collectives import of_all, own, share_of, summed, summed_each
from ssmc.runtime.errors import CalibrationError
from ssmc.runtime.scan import ScanInputs

TOKENS = 2048  # of a step, in whole samples: the states then are those the model will have
HELD_OUT = 8  # one sample in so many only judges the steps
PATIENCE = 6  # judgements without a better layer after which the steps end; the first steps are the largest
RATE = 0.01  # of a tensor's root mean square: how far an entry moves a step at the height of the schedule


@dataclass(frozen=True)
class Refinement(Record):
    """What refining a layer achieved.

    Errors are squared, on the held-out samples, relative to what the layer should add to the residual stream.
    """

    name = "refined"

    steps: int  # that were run
    best_step: int  # whose weights the layer has now; 0: those it had before
    error: float
    error_before: float

    def as_manifest(self) -> dict[str, Any]:
        """Steps and errors."""
        return {"refined": asdict(self)}


def stepped_on(samples: int) -> int:
    """How many of the samples, the first ones, steps are taken on; the others judge them."""
    return samples - max(1, samples // HELD_OUT)


def refine(job: Job, steps: int) -> Refinement:
    """Refine the mixer of a layer in place; never for the worse on the held-out samples.

    Only the states that are not silent are computed. Zeros stay, but for those of A_log that are decay rates like any
    other: they stay where entries of A_log were pruned.

    Args:
        job: the pruned and repaired layer, at least two samples of what it reads in the pruned model, and what it put
            out in the dense model.
        steps: gradient steps of Adam, at most.
    """
    layer = _Layer(job)
    block, parameters = layer.modules
    moving = list(parameters.values())
    with only_these_move(moving, block):
        pinned = [_pinned(name, p, job.plan.carries_out("entries")) for name, p in parameters.items()]
        seen = stepped_on(layer.samples)  # of all processes, which share them
        order = batches(seen, max(1, TOKENS // layer.length), job.seed)

        def gradients() -> list[torch.Tensor]:
            found = summed_each(layer.gradients(own(next(order)), moving))
            hold(found, pinned)
            return found

        descent = descend(
            moving,
            gradients,
            lambda: layer.error(own(range(seen, layer.samples))),
            Pace(steps, [RATE * _root_mean_square(p) for p in moving], patience=PATIENCE),
            job.progress,
            f"{job.label}: refining",
        )
    return Refinement(descent.steps, descent.best_step, descent.error, descent.error_before)


def check_samples(tokens: torch.Tensor) -> None:
    """Make sure that some samples can be held out.

    Args:
        tokens: (nsamples, seqlen).

    Raises:
        CalibrationError: there is only one.
    """
    if of_all(len(tokens)) < 2:
        raise CalibrationError(
            "Refining needs at least 2 calibration samples, as some judge the steps on the others; the text has one of "
            f"{tokens.shape[1]} tokens. Give more text with --calib or use a smaller --seqlen."
        )


class _Layer:
    """A layer, what it reads, and what it should put out."""

    def __init__(self, job: Job):
        self._architecture, self._block, self._mixer = job.architecture, job.work, job.mixer
        self._kept = job.states_kept
        self._hidden, self._stream = job.samples, job.dense_output
        count, self.length, _ = self._hidden.shape
        self.samples = of_all(count)

    @property
    def modules(self) -> tuple[nn.Module, dict[str, nn.Parameter]]:
        """The layer, and the parameters of its mixer, by name: those that move."""
        return self._block, dict(self._mixer.named_parameters())

    def gradients(self, samples: Sequence[int], parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
        """What some samples of this process add to those of the relative error on the samples of all."""
        with torch.enable_grad():
            wrong, energy = self._squares(samples) if samples else (None, torch.zeros((), device=parameters[0].device))
            energy = summed(energy.detach())
            if wrong is None:
                return [torch.zeros_like(parameter) for parameter in parameters]
            relative = wrong / energy.clamp(min=torch.finfo(energy.dtype).tiny)
            return list(torch.autograd.grad(relative, parameters))

    @torch.no_grad()
    def error(self, samples: Sequence[int]) -> float:
        """The relative error on some samples of each process, one of them at a time."""
        squares = [[float(s) for s in self._squares([i])] for i in samples]
        wrong, energy = (summed(float(sum(row[column] for row in squares))) for column in (0, 1))
        return wrong / energy if energy > 0 else 0.0

    def _squares(self, samples: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Squares of what the layer adds amiss and of what it should add, summed."""
        device = device_of(self._block)
        hidden, stream = (computing(t[list(samples)].to(device)) for t in (self._hidden, self._stream))
        expanded = self._architecture.expand(self._mixer, self._architecture.normed(self._block, hidden))
        inputs = self._architecture.scan_inputs(self._mixer, *expanded)
        if isinstance(inputs, ScanInputs):
            inputs = inputs.some_states(self._kept)
        y, _ = self._architecture.scan(self._mixer, inputs)
        added = self._mixer.out_proj(y)  # (B, L, d_model)
        wanted = (stream - hidden)[..., : added.shape[2]]
        return (added - wanted).square().sum(), wanted.square().sum()


def _pinned(name: str, parameter: torch.Tensor, a_log_zeros: bool) -> torch.Tensor | None:
    """Entries that stay zero; None: a zero of A_log is a decay rate like any other."""
    return parameter.detach() == 0 if a_log_zeros or name != "A_log" else None


def _root_mean_square(parameter: torch.Tensor) -> float:
    """Of the entries that are not zero."""
    entries = parameter.detach()[parameter.detach() != 0]
    return float(entries.square().mean().sqrt()) if len(entries) else 0.0


def refine_layer(job: Job) -> None:
    """Take gradient steps on a layer; one that they do not make better stays as it is."""
    before = copy.deepcopy(job.mixer.state_dict())
    if job.plan.fits_out_proj:  # what judges must not have been seen: a fit on all samples would look better
        fit_out_proj(job.on(slice(share_of(stepped_on(of_all(len(job.samples)))))))
    refined = refine(job, job.config.refine)
    if refined.best_step == 0:
        job.mixer.load_state_dict(before)
    job.note(refined)
