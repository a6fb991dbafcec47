"""Gradient steps on all parameters of a pruned model towards the predictions of the dense one (Hinton et al. 2015).

The loss is the Kullback-Leibler divergence of the next-token distributions, KL(dense || pruned), over every token of
calibration text; no labels are read. What was pruned stays zero. The teacher's logits are computed on the fly, a few
rows at a time: neither model's logits ever lie in memory as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ssmc.compressor.methods.descent import Descent, Pace, batches, descend
from ssmc.runtime.errors import CalibrationError
from ssmc.runtime.measure.losses import IGNORED, LOGITS_AT_ONCE, last_hidden, token_losses
from ssmc.runtime.models.families import Architecture
from ssmc.runtime.progress import NO_PROGRESS, Progress

WINDOW = 512  # tokens of a sequence: long enough for states to matter, short enough for many in a step
SEQUENCES = 4  # of a step
HELD_OUT = 16  # sequences that only judge
RATE = 1e-3  # how far an entry moves a step at the height of the schedule; three times as much made a model worse
CHECKS = 8


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
    """

    steps: int
    best_step: int
    divergence: float
    divergence_before: float
    excess: float
    excess_before: float
    tokens: int


def distill(
    pair: Pair, tokens: torch.Tensor, steps: int, seed: int = 0, progress: Progress = NO_PROGRESS
) -> Distillation:
    """Distil a pruned model in place; never for the worse on the held-out sequences.

    Args:
        pair: both models in float32 with the fast scan in use, on the device to compute on.
        tokens: (n, L) int64; the last `HELD_OUT` sequences, or a quarter of few, only judge.
        steps: gradient steps, at most.
        seed: of the order of sequences.
        progress: told about steps.

    Raises:
        CalibrationError: there are fewer than two sequences.
    """
    if len(tokens) < 2:
        raise CalibrationError(
            "Distillation needs at least two sequences of text, as some judge the steps on the others. Give more text "
            "with --calib."
        )
    held = min(HELD_OUT, max(1, len(tokens) // 4))
    seen, judged = tokens[:-held], tokens[-held:]
    device = pair.student.get_output_embeddings().weight.device
    wanted = last_hidden(pair.teacher, judged)
    dense, before = (_loss(model, judged) for model in (pair.teacher, pair.student))
    order = batches(len(seen), SEQUENCES, seed)
    with _trained(pair) as (parameters, pinned):

        def gradients() -> list[torch.Tensor]:
            for parameter in parameters:
                parameter.grad = None
            inputs = seen[next(order)].to(device)
            divergence(pair, inputs, last_hidden(pair.teacher, inputs), backward=True)
            found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            for gradient, entries in zip(found, pinned, strict=True):
                if entries is not None:
                    gradient.masked_fill_(entries, 0)
            return found

        def judge() -> float:
            rows = zip(judged.split(SEQUENCES), wanted.split(SEQUENCES), strict=True)
            total = sum(divergence(pair, row.to(device), hidden) * len(row) for row, hidden in rows)
            return total / len(judged)

        pace = Pace(steps, [RATE] * len(parameters), checks=CHECKS)
        done: Descent = descend(parameters, gradients, judge, pace, progress, "distilling")
    return Distillation(
        steps=done.steps,
        best_step=done.best_step,
        divergence=done.error,
        divergence_before=done.error_before,
        excess=_loss(pair.student, judged) - dense,
        excess_before=before - dense,
        tokens=min(SEQUENCES, len(seen)) * tokens.shape[1],
    )


def _loss(model: nn.Module, sequences: torch.Tensor) -> float:
    """The mean loss of the next token, in nats, over (n, L) sequences."""
    targets = F.pad(sequences[:, 1:], (0, 1), value=IGNORED)
    losses = [token_losses(model, *pair)[0] for pair in zip(sequences.split(1), targets.split(1), strict=True)]
    return float(torch.cat(losses)[:, :-1].mean())


def divergence(pair: Pair, inputs: torch.Tensor, wanted: torch.Tensor, backward: bool = False) -> float:
    """The mean of KL(teacher || student) over the tokens of `inputs`, in nats.

    Args:
        pair: both models.
        inputs: (B, L) token ids on the models' device.
        wanted: (B, L, d_model) what the teacher's last norm puts out for them.
        backward: add the gradients of it to those of the student's parameters.
    """
    count, total = inputs.numel(), 0.0
    with torch.set_grad_enabled(backward):
        hidden = pair.student.base_model(inputs, use_cache=False)[0]  # (B, L, d_model)
        leaf = hidden.detach().requires_grad_(backward)
        vocabulary = pair.student.get_output_embeddings().weight.shape[0]
        step = max(1, LOGITS_AT_ONCE // vocabulary)
        for ours, theirs in zip(leaf.flatten(0, 1).split(step), wanted.flatten(0, 1).split(step), strict=True):
            with torch.no_grad():
                p = F.log_softmax(pair.architecture.logits(pair.teacher, theirs[None])[0].float(), dim=-1)
            q = F.log_softmax(pair.architecture.logits(pair.student, ours[None])[0].float(), dim=-1)
            part = F.kl_div(q, p, reduction="sum", log_target=True) / count
            if backward:
                part.backward()  # piece by piece: the logits of all tokens would not fit
            total += float(part.detach())
        if backward:
            hidden.backward(leaf.grad)
    return total


@contextmanager
def _trained(pair: Pair) -> Iterator[tuple[list[nn.Parameter], list[torch.Tensor | None]]]:
    """The student's parameters, with gradients inside the block, and the entries of each that were pruned."""
    dense = dict(pair.teacher.named_parameters())
    flags = {p: p.requires_grad for model in (pair.student, pair.teacher) for p in model.parameters()}
    moving, pinned = [], []
    for name, parameter in pair.student.named_parameters():
        entries = (parameter.detach() == 0) & (dense[name].detach() != 0)
        moving.append(parameter)
        pinned.append(entries if bool(entries.any()) else None)
    try:
        for parameter in flags:
            parameter.requires_grad_(False)
        for parameter in moving:
            parameter.requires_grad_(True)
        yield moving, pinned
    finally:
        for parameter, flag in flags.items():
            parameter.grad = None
            parameter.requires_grad_(flag)
