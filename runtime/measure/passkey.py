"""Passkeys hidden in a text: some tokens that make no sense there, asked for again further on, by distance.

A phrase of random tokens k1 k2 k3 k4 v overwrites a few tokens of a real text; a given number of tokens later k1 k2 k3
k4 stands there again, and v is to be predicted. No sentence of any language asks for it, so any model that continues
what it has seen before can be asked, in its own vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ssmc.runtime.measure.losses import IGNORED
from ssmc.runtime.measure.mqar import Questions

KEY = 4  # tokens that ask
CELL = 8  # tokens that a phrase has for itself
DISTANCES = (32, 64, 128, 256, 512)


def hide(
    windows: torch.Tensor, generator: torch.Generator, questions: int = 10, distances: Sequence[int] = DISTANCES
) -> Questions:
    """Hide phrases in windows of text, and ask for them.

    Args:
        windows: (n, L) token ids, which stay as they are.
        generator: of torch, on the CPU.
        questions: of a window, at most; some may find no room.
        distances: between the two places of a phrase, in turns; whole multiples of CELL. Those that do not fit into L
            are left out.
    """
    known, tokens = windows.unique(), windows.clone()
    targets, distance = torch.full_like(windows, IGNORED), torch.zeros_like(windows)
    cells = windows.shape[1] // CELL
    steps = [d // CELL for d in distances if d // CELL < cells]
    for row in range(len(windows) if steps else 0):
        free = torch.ones(cells, dtype=torch.bool)
        for number in range(questions):
            step = steps[number % len(steps)]
            open_cells = (free[: cells - step] & free[step:]).nonzero()[:, 0]
            if not len(open_cells):
                continue
            cell = int(open_cells[torch.randint(len(open_cells), (1,), generator=generator)])
            free[[cell, cell + step]] = False
            phrase = known[torch.randint(len(known), (KEY + 1,), generator=generator)]
            for place in (CELL * cell, CELL * (cell + step)):
                tokens[row, place : place + KEY + 1] = phrase
            asked = CELL * (cell + step) + KEY - 1
            targets[row, asked], distance[row, asked] = phrase[KEY], CELL * step
    return Questions(tokens, targets, distance)
