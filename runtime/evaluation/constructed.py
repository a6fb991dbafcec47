"""Constructed recall in a model's own vocabulary: passkeys hidden in the text, and lists of keys and values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ssmc.runtime.measure.mqar import Answers, Mqar, Questions, ask, right_answers, summarised
from ssmc.runtime.measure.passkey import DISTANCES, hide

if TYPE_CHECKING:
    from ssmc.runtime.measure.losses import LanguageModel

PASSKEY, MQAR = "passkey", "mqar"
TASKS = {PASSKEY: "passkeys hidden in the text", MQAR: "values of listed keys"}  # in words
LEAST = 0.1
"""Part of the questions that the first model must answer: one that answers fewer has no such recall to lose."""

_WINDOWS, _LENGTH = 16, 1024  # of text, with passkeys
_LISTS, _PAIRS, _LIST_LENGTH = 64, 8, 64
_EDGES = {PASSKEY: DISTANCES[:-1], MQAR: (16, 32)}


@dataclass(frozen=True)
class Constructed:
    """What one model answers.

    Attributes:
        task: one of `TASKS`.
        answers: to all questions first, then by distance.
    """

    task: str
    answers: tuple[Answers, ...]


def constructed_questions(windows: torch.Tensor, seed: int = 0) -> dict[str, Questions]:
    """The questions, the same for every model.

    Args:
        windows: (W, L) tokens of a text, of which some are used.
        seed: of what is asked, and where.
    """
    generator, known = torch.Generator().manual_seed(seed), windows.unique().tolist()
    found = {PASSKEY: hide(windows[:_WINDOWS, :_LENGTH], generator)}
    if len(known) > _PAIRS:
        lists = Mqar(known, known, _PAIRS, _LIST_LENGTH, filler=known[0])
        found[MQAR] = ask(lists, _LISTS, generator)
    return {task: questions for task, questions in found.items() if (questions.distances > 0).any()}


def answer(model: LanguageModel, questions: Mapping[str, Questions], batch: int) -> tuple[Constructed, ...]:
    """What a model answers, `batch` sequences at once."""
    return tuple(
        Constructed(task, summarised(asked, right_answers(model, asked, batch), _EDGES[task]))
        for task, asked in questions.items()
    )


def nothing_to_lose(dense: Sequence[Constructed]) -> list[str]:
    """What to say about tasks that the first model cannot do."""
    return [
        f"The first model answers {found.answers[0].accuracy:.0%} of the questions for {TASKS[found.task]}: it has no "
        "such recall to lose, so that figure says nothing about the others."
        for found in dense
        if found.answers[0].accuracy < LEAST
    ]
