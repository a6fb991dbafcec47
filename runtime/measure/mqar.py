"""Multi-query associative recall, constructed (MQAR; Arora et al., Zoology, arXiv 2312.04927, section 3).

A sequence lists pairs of a key and a value, then asks for some keys again, at places drawn at random; what is to be
predicted at each asked key is its value. Nothing but memory helps, so the accuracy by distance shows what a model's
states can hold. A model of ordinary text has not learnt the task as such, yet one that continues what it has seen
before can do some of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ssmc.runtime.collectives import Dealt
from ssmc.runtime.measure.losses import IGNORED, token_losses

if TYPE_CHECKING:
    from ssmc.runtime.measure.losses import LanguageModel

FILLER = 0  # the token between queries


@dataclass(frozen=True)
class Mqar:
    """A task.

    Attributes:
        keys: token ids that keys are drawn from, each at most once in a sequence.
        values: token ids that values are drawn from, with repetition.
        pairs: of a sequence.
        length: tokens of a sequence; every pair is asked for once, so there must be room for all of them twice.
        filler: the token where nothing stands.
    """

    keys: Sequence[int]
    values: Sequence[int]
    pairs: int
    length: int
    filler: int = FILLER

    def __post_init__(self) -> None:
        """The pairs must fit.

        Raises:
            ValueError: they do not.
        """
        if self.pairs > len(self.keys) or 4 * self.pairs > self.length:
            raise ValueError(f"{self.pairs} pairs need as many keys and four tokens each, not {self.length} in all")

    @classmethod
    def of_vocabulary(cls, size: int, pairs: int, length: int) -> Mqar:
        """Of a model made for it: token 0 fills, the first half of the others are keys, the second values."""
        return cls(range(1, size // 2), range(size // 2, size), pairs, length)


@dataclass(frozen=True)
class Questions:
    """Sequences of a task."""

    tokens: torch.Tensor  # (n, length) int64
    targets: torch.Tensor  # (n, length): the value behind each asked key, IGNORED elsewhere
    distances: torch.Tensor  # (n, length): tokens between an asked key and the same key in the list; 0 elsewhere


def ask(task: Mqar, count: int, generator: torch.Generator, queries: int | None = None) -> Questions:
    """Draw sequences.

    Args:
        task: what they are made of.
        count: how many.
        generator: of torch, on the CPU.
        queries: of a sequence, as far as there is room, for keys drawn at random; None: one for each key.
    """
    pairs, listed = task.pairs, 2 * task.pairs
    chosen = torch.rand(count, len(task.keys), generator=generator).argsort(1)[:, :pairs]
    keys = torch.tensor(list(task.keys))[chosen]  # (n, pairs)
    values = torch.tensor(list(task.values))[torch.randint(len(task.values), (count, pairs), generator=generator)]
    tokens = torch.full((count, task.length), task.filler)
    tokens[:, 0:listed:2], tokens[:, 1:listed:2] = keys, values
    slots = (task.length - listed) // 2
    which = torch.arange(pairs).expand(count, -1)  # pair of each query
    if queries is not None:
        which = torch.randint(pairs, (count, min(queries, slots)), generator=generator)
    places = listed + 2 * torch.rand(count, slots, generator=generator).argsort(1)[:, : which.shape[1]]
    keys, values = keys.gather(1, which), values.gather(1, which)
    tokens.scatter_(1, places, keys).scatter_(1, places + 1, values)
    targets = torch.full_like(tokens, IGNORED).scatter_(1, places, values)
    distances = torch.zeros_like(tokens).scatter_(1, places, places - 2 * which)
    return Questions(tokens, targets, distances)


@dataclass(frozen=True)
class Answers:
    """How many of some questions a model answers rightly.

    Attributes:
        low: the smallest distance among them, in tokens.
        high: the largest.
        asked: how many questions there are.
        accuracy: part of them whose likeliest token was the value.
        stderr: its standard error, over sequences.
    """

    low: int
    high: int
    asked: int
    accuracy: float
    stderr: float


@torch.inference_mode()
def right_answers(model: LanguageModel, questions: Questions, batch: int = 64) -> torch.Tensor:
    """Where the likeliest token is the value, (n, length) bool, False where nothing is asked."""
    dealt = Dealt(len(questions.tokens), batch)
    parts = [token_losses(model, questions.tokens[rows], questions.targets[rows])[1] for rows in dealt.own]
    return dealt.together(torch.cat([torch.empty(0, questions.tokens.shape[1], dtype=torch.bool), *parts]))


def summarised(questions: Questions, right: torch.Tensor, edges: Sequence[int] = ()) -> tuple[Answers, ...]:
    """The accuracy of all questions, then by distance.

    Args:
        questions: what was asked.
        right: what `right_answers` says.
        edges: distances at which one part of the questions ends, ascending; the last part is open.
    """
    asked = questions.distances > 0
    bounds = [(0, math.inf), *zip((0, *edges), (*edges, math.inf), strict=True)] if edges else [(0, math.inf)]
    found = []
    for low, high in bounds:
        mask = asked & (questions.distances > low) & (questions.distances <= high)
        if mask.any():
            found.append(_answers(questions.distances, mask, right))
    return tuple(found)


def _answers(distances: torch.Tensor, mask: torch.Tensor, right: torch.Tensor) -> Answers:
    total = int(mask.sum())
    accuracy = float(right[mask].double().mean())
    spread = torch.where(mask, right.double() - accuracy, 0.0).sum(1)  # of each sequence, against its share
    rows = len(mask)
    stderr = math.sqrt(float(spread.square().sum()) * rows / max(1, rows - 1)) / total
    return Answers(int(distances[mask].min()), int(distances[mask].max()), total, accuracy, stderr)
