"""Gradient steps on all parameters of a pruned model towards the predictions of the dense one (Hinton et al. 2015).

The loss is the Kullback-Leibler divergence of the next-token distributions, KL(dense || pruned), over every token of
calibration text; no labels are read. What was pruned stays zero, and is not computed. The teacher's logits are made on
the fly, a few rows at a time: neither model's logits ever lie in memory as a whole.

Several processes each take some of the sequences of a step, and all of them the step along the sum of their gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ssmc.compressor.distillation.muon import MuonAndAdam
from ssmc.compressor.distillation.narrowed import Left, narrowed
from ssmc.compressor.methods.descent import Descent, Pace, batches, descend
from ssmc.compressor.methods.gradients import hold, only_these_move
from ssmc.runtime.collectives import Dealt, summed, summed_each
from ssmc.runtime.errors import CalibrationError
from ssmc.runtime.half_precision import half_precision
from ssmc.runtime.measure.losses import LOGITS_AT_ONCE, last_hidden
from ssmc.runtime.measure.perplexity import losses_of_tokens
from ssmc.runtime.measure.recall import far_excess
from ssmc.runtime.models.families import Architecture
from ssmc.runtime.progress import NO_PROGRESS, Progress

WINDOW = 512  # tokens of a sequence: long enough for states to matter, short enough for many in a step
STEP = 4 * WINDOW  # tokens of a step, in whole sequences
HELD_OUT = 4  # times as many sequences as a step takes only judge
RATE, LOST = 5e-4, 0.14  # as Adam has it, at the height of the schedule, of a model that lost so many nats
OTHERS = 0.4  # times that, for what is no matrix: Adam's noise in an embedding costs more than it gains
FEW = 300  # steps that RATE is for; the noise of more of them adds up, and each is smaller
LEAST, MOST = 0.2, 2.5  # times RATE: the noise of steps costs as their square, so who lost less takes smaller ones
CHECKS, EVERY = 8, 50  # judgements, and steps between two of them, at most
REMEMBERED = 1 << 30  # bytes of what the teacher puts out for sequences that come again


def sequences_of(length: int) -> int:
    """How many sequences of so many tokens a step takes."""
    return max(1, STEP // length)


@dataclass(frozen=True)
class Pair:
    """A pruned model and the dense one it came from, of the same family, vocabulary and shapes."""

    architecture: Architecture
    student: nn.Module
    teacher: nn.Module

    def to(self, device: torch.device) -> None:
        """Move both."""
        self.student.to(device)
        self.teacher.to(device)


@dataclass(frozen=True)
class Course:
    """What a distillation does.

    Attributes:
        steps: gradient steps, at most.
        seed: of the order of sequences.
        layers: what is left of each layer of the pruned model; none where nothing went inside the layers.
        lost: divergence from the dense model, which decides how large steps are; None: it is measured.
        start: state of an earlier run, to go on with.
        keep: is given the state after every judgement.
    """

    steps: int
    seed: int = 0
    layers: Sequence[Left] = ()
    lost: float | None = None
    start: Mapping[str, Any] | None = None
    keep: Callable[[dict[str, Any]], None] | None = None


@dataclass(frozen=True)
class Distillation:
    """What distilling achieved; means over tokens, in nats, on held-out sequences.

    Attributes:
        steps: that were run.
        best_step: whose weights the model has now; 0: those it had before.
        divergence: KL(dense || pruned).
        divergence_before: the same before the first step.
        excess: loss above the dense model's.
        excess_before: the same before the first step.
        tokens: of a step.
        excess_far: loss above the dense model's on tokens seen more than 100 back; None where there are none.
    """

    steps: int
    best_step: int
    divergence: float
    divergence_before: float
    excess: float
    excess_before: float
    tokens: int
    excess_far: float | None = None


def distill(pair: Pair, tokens: torch.Tensor, course: Course, progress: Progress = NO_PROGRESS) -> Distillation:
    """Distil a pruned model in place; never for the worse on the held-out sequences.

    Args:
        pair: both models in float32 with the fast scan in use, on the device to compute on.
        tokens: (n, L) int64; the last ones, four times those of a step or a quarter of few, only judge.
        course: what to do.
        progress: told about steps.

    Raises:
        CalibrationError: there are fewer than two sequences.
    """
    if len(tokens) < 2:
        raise CalibrationError(
            "Distillation needs at least two sequences of text, as some judge the steps on the others. Give more text "
            "with --calib."
        )
    held = min(HELD_OUT * sequences_of(tokens.shape[1]), max(1, len(tokens) // 4))
    seen, judged = tokens[:-held], tokens[-held:]
    dense, before = (_losses(model, judged) for model in (pair.teacher, pair.student))
    with narrowed(pair.architecture, pair.student, course.layers):
        moving = _what_moves(pair, course.layers)
        with only_these_move(moving.parameters, pair.student, pair.teacher):
            done = _Lesson(pair, seen, judged, moving).descend(course, progress)
    after = _losses(pair.student, judged)
    far = far_excess(after, dense)
    return Distillation(
        steps=done.steps,
        best_step=done.best_step,
        divergence=done.error,
        divergence_before=done.error_before,
        excess=float((after[1] - dense[1]).mean()),
        excess_before=float((before[1] - dense[1]).mean()),
        tokens=min(sequences_of(tokens.shape[1]), len(seen)) * tokens.shape[1],
        excess_far=None if far is None else far.excess,
    )


def teach(
    pair: Pair,
    tokens: torch.Tensor,
    course: Course,
    progress: Progress = NO_PROGRESS,
    remembered: dict[int, torch.Tensor] | None = None,
) -> None:
    """As `distill`, but nothing is judged, and the model has the weights of the last step.

    Args:
        pair: as for `distill`.
        tokens: (n, L) int64.
        course: what to do.
        progress: told about steps.
        remembered: what the teacher puts out, by sequence: of earlier calls with the same tokens, and for later ones.
    """
    with narrowed(pair.architecture, pair.student, course.layers):
        moving = _what_moves(pair, course.layers)
        with only_these_move(moving.parameters, pair.student, pair.teacher):
            _Lesson(pair, tokens, None, moving, remembered).descend(course, progress)


@dataclass(frozen=True)
class _Moving:
    """What moves: parameters, those of them that are matrices of linear maps, those of embedding and head, and which
    entries of each stay zero."""

    parameters: list[nn.Parameter]
    matrices: list[nn.Parameter]
    words: list[nn.Parameter]
    pinned: list[torch.Tensor | None]

    def rates(self, lost: float, steps: int) -> list[float]:
        """How far an entry of each moves at most in one of so many steps, in a model that lost so many nats a token."""
        size = min(max(math.sqrt(max(lost, 0.0) / LOST), LEAST), MOST)
        rate = RATE * size * math.sqrt(FEW / max(FEW, steps))
        linear, words = ({id(p) for p in some} for some in (self.matrices, self.words))
        # most rows of an embedding see little but noise: the less was lost, the less they gain by moving
        others = {True: OTHERS * rate * min(1.0, size), False: OTHERS * rate}
        return [rate if id(p) in linear else others[id(p) in words] for p in self.parameters]


class _Lesson:
    """A pair, the sequences it learns on and those that judge, and what moves."""

    def __init__(
        self,
        pair: Pair,
        seen: torch.Tensor,
        judged: torch.Tensor | None,
        moving: _Moving,
        remembered: dict[int, torch.Tensor] | None = None,
    ):
        self._pair, self._seen, self._moving = pair, seen, moving
        self._size = sequences_of(seen.shape[1])
        head = pair.student.get_output_embeddings().weight
        self._device = head.device
        self._remembered = {} if remembered is None else remembered
        self._may_remember = seen.numel() * head.shape[1] * 4 <= REMEMBERED
        self._judged = 0 if judged is None else len(judged)
        # what judges: sequences, and what the teacher's last norm puts out for them
        own = [] if judged is None else [judged[rows] for rows in Dealt(len(judged), self._size).own]
        self._judges = [(rows, last_hidden(pair.teacher, rows)) for rows in own]

    def descend(self, course: Course, progress: Progress) -> Descent:
        """Take the steps."""
        order = batches(len(self._seen), self._size, course.seed)
        for _ in range(course.start["step"] if course.start else 0):
            next(order)
        checks = max(CHECKS, math.ceil(course.steps / EVERY))
        moving = self._moving
        lost = course.lost if course.lost is not None else self._judge()
        return descend(
            moving.parameters,
            lambda: self._gradients(next(order)),
            self._judge if self._judged else None,
            Pace(course.steps, moving.rates(lost, course.steps), checks=checks, backs_off=True),
            progress,
            "distilling",
            optimiser=lambda groups: MuonAndAdam(groups, moving.matrices, moving.pinned),
            before=lost,
            start=course.start,
            keep=course.keep,
        )

    def _gradients(self, numbers: Sequence[int]) -> list[torch.Tensor]:
        parameters = self._moving.parameters
        for parameter in parameters:
            parameter.grad = None
        own = [number for piece in Dealt(len(numbers)).own for number in numbers[piece]]
        if own:
            inputs, part = self._seen[own].to(self._device), len(own) / len(numbers)
            with half_precision(self._device):
                divergence(self._pair, inputs, self._taught(own), backward=part)
        found = summed_each([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
        hold(found, self._moving.pinned)
        return found

    def _taught(self, numbers: Sequence[int]) -> torch.Tensor:
        """What the teacher's last norm puts out for some sequences; of few, they come again and are remembered."""
        new = [n for n in numbers if n not in self._remembered]
        fresh = dict(zip(new, last_hidden(self._pair.teacher, self._seen[new]), strict=True)) if new else {}
        found = torch.stack([self._remembered[n] if n in self._remembered else fresh[n] for n in numbers])
        if self._may_remember:
            self._remembered |= fresh
        return found

    def _judge(self) -> float:
        found = [divergence(self._pair, rows.to(self._device), wanted) * len(rows) for rows, wanted in self._judges]
        return max(0.0, summed(float(sum(found))) / self._judged)  # below it only by rounding


def _losses(model: nn.Module, sequences: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences (n, L) and the losses of their predictions (n, L - 1), in nats."""
    return losses_of_tokens(model, sequences.reshape(-1), sequences.shape[1])


def divergence(pair: Pair, inputs: torch.Tensor, wanted: torch.Tensor, backward: float = 0.0) -> float:
    """The mean of KL(teacher || student) over the tokens of `inputs`, in nats.

    Args:
        pair: both models.
        inputs: (B, L) token ids on the models' device.
        wanted: (B, L, d_model) what the teacher's last norm puts out for them.
        backward: add so many times its gradients to those of the student's parameters.
    """
    count, total = inputs.numel(), 0.0
    with torch.set_grad_enabled(backward > 0):
        hidden = pair.student.base_model(inputs, use_cache=False)[0]  # (B, L, d_model)
        leaf = hidden.detach().requires_grad_(backward > 0)
        vocabulary = pair.student.get_output_embeddings().weight.shape[0]
        step = max(1, LOGITS_AT_ONCE // vocabulary)
        for ours, theirs in zip(leaf.flatten(0, 1).split(step), wanted.flatten(0, 1).split(step), strict=True):
            with torch.no_grad():
                p = F.log_softmax(pair.architecture.logits(pair.teacher, theirs[None])[0].float(), dim=-1)
            q = F.log_softmax(pair.architecture.logits(pair.student, ours[None])[0].float(), dim=-1)
            part = F.kl_div(q, p, reduction="sum", log_target=True) / count
            if backward:
                (backward * part).backward()  # piece by piece: the logits of all tokens would not fit
            total += float(part.detach())
        if backward:
            hidden.backward(leaf.grad)
    return total


def _what_moves(pair: Pair, layers: Sequence[Left]) -> _Moving:
    """The student's parameters, those that are matrices, and what was pruned in each."""
    moving = dict(pair.student.named_parameters())
    head = pair.student.get_output_embeddings()
    linear = {id(m.weight) for m in pair.student.modules() if isinstance(m, nn.Linear) and m is not head}
    pinned: dict[str, torch.Tensor] = {}
    with narrowed(pair.architecture, pair.teacher, layers, write_back=False):
        dense = dict(pair.teacher.named_parameters())
        for name, parameter in moving.items():
            if parameter.shape != dense[name].shape:  # experts that are gone are cut out, and leave no zeros
                continue
            entries = (parameter.detach() == 0) & (dense[name].detach() != 0)
            if bool(entries.any()):
                pinned[name] = entries
    parameters = list(moving.values())
    matrices = [p for p in parameters if id(p) in linear and p is not head.weight]
    words = [head.weight, pair.student.get_input_embeddings().weight]
    return _Moving(parameters, matrices, words, [pinned.get(name) for name in moving])
