"""Recall seen in plain text: the loss by kind of token, since a mean over all tokens hides what states are for.

A token is *repeated* where it ends a trigram that stood before in the same window: a model that remembers the earlier
place predicts it better than one that does not. Such tokens are told apart by how far back the earlier place is, and by
how rare the token is in the text, since a frequent one is guessed without any memory. All others are *new*. The split
needs no labels and works on any text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

FAR = 100  # tokens back
DISTANCES = (32, FAR, 400)  # where the buckets of distance end; the last one is open
RARE = 1e-3  # part of the text's tokens that a rare one makes up at most


@dataclass(frozen=True)
class KindLoss:
    """The loss on tokens of one kind.

    Attributes:
        kind: "all", "repeated", "far", "rare", "new", or "repeated, 33 to 100 back".
        tokens: how many there are.
        nll: their mean negative log-likelihood in nats; None where there are none.
        stderr: its standard error over windows; None for a single window.
        excess: `nll` above the dense model's on the same tokens; None for the dense model itself.
        excess_stderr: its standard error, paired by token, over windows.
    """

    kind: str
    tokens: int
    nll: float | None
    stderr: float | None
    excess: float | None = None
    excess_stderr: float | None = None


def kinds_of(windows: torch.Tensor) -> dict[str, np.ndarray]:
    """Which predictions are of which kind.

    Args:
        windows: (W, L) token ids, each window read from a fresh state.

    Returns:
        By kind, (W, L - 1) bool, for the tokens at 1 ... L - 1 of each window.
    """
    back = np.stack([repeats(window) for window in windows.tolist()])[:, 1:]
    tokens = windows.numpy()
    counts = np.bincount(tokens.ravel())
    repeated = back > 0
    rare = (counts <= RARE * tokens.size)[tokens][:, 1:]
    kinds = {"all": np.ones_like(repeated), "repeated": repeated, "far": back > FAR, "rare": repeated & rare}
    kinds["new"] = ~repeated
    for low, high in zip((0, *DISTANCES), (*DISTANCES, None), strict=True):
        name = f"repeated, {low + 1} to {high} back" if high else f"repeated, more than {low} back"
        kinds[name] = repeated & (back > low) & (back <= (high or math.inf))
    return kinds


def repeats(window: list[int]) -> np.ndarray:
    """How far back the trigram that each token of a window ends stood last, (L,); 0 where it is new."""
    last: dict[tuple[int, int, int], int] = {}
    found = np.zeros(len(window), dtype=np.int64)
    for place in range(2, len(window)):
        trigram = (window[place - 2], window[place - 1], window[place])
        found[place] = place - last.get(trigram, place)
        last[trigram] = place
    return found


def recall_of(losses: Sequence[tuple[torch.Tensor, torch.Tensor]], dense: Sequence[bool]) -> list[tuple[KindLoss, ...]]:
    """The loss by kind of token of several models on the same windows, compared with the first.

    Args:
        losses: windows (W, L) and losses (W, L - 1) of each model, as `losses_of_tokens` returns them.
        dense: which of them has nothing to be compared with.
    """
    if not losses:
        return []
    kinds, first = kinds_of(losses[0][0]), losses[0][1].numpy()
    return [
        loss_by_kind(ours.numpy(), kinds, None if alone else first)
        for (_, ours), alone in zip(losses, dense, strict=True)
    ]


def of_kind(recall: Sequence[KindLoss], kind: str) -> KindLoss | None:
    """The loss on one kind of tokens; None where there are none of it, or nothing was measured."""
    return next((loss for loss in recall if loss.kind == kind and loss.tokens), None)


def far_excess(ours: tuple[torch.Tensor, torch.Tensor], dense: tuple[torch.Tensor, torch.Tensor]) -> KindLoss | None:
    """What a model loses on far tokens above another, both as `losses_of_tokens` returns them; None: there are none."""
    return of_kind(recall_of([dense, ours], [True, False])[1], "far")


def loss_by_kind(
    losses: np.ndarray, kinds: Mapping[str, np.ndarray], dense: np.ndarray | None = None
) -> tuple[KindLoss, ...]:
    """Mean losses of one model.

    Args:
        losses: (W, L - 1), nats, of every prediction.
        kinds: what `kinds_of` says of the same windows.
        dense: the losses of the model to compare with, on the same windows.
    """
    found = []
    for kind, mask in kinds.items():
        nll, stderr = _mean(losses, mask)
        excess = (None, None) if dense is None else _mean(losses - dense, mask)
        found.append(KindLoss(kind, int(mask.sum()), nll, stderr, *excess))
    return tuple(found)


def _mean(values: np.ndarray, mask: np.ndarray) -> tuple[float | None, float | None]:
    """The mean over masked entries, and its standard error as a ratio of sums over windows (rows)."""
    total = int(mask.sum())
    if not total:
        return None, None
    mean = math.fsum(values[mask].tolist()) / total
    rows = len(values)
    if rows == 1:
        return mean, None
    spread = (np.where(mask, values - mean, 0.0)).sum(axis=1)  # of each window, against its share of the mean
    return mean, math.sqrt(float((spread**2).sum()) * rows / (rows - 1)) / total
