"""What an export loses against the model it was made from: perplexity of both on the same text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ssmc.runtime.errors import VerificationError
from ssmc.runtime.measure.perplexity import mean_and_stderr

MOST_LOST = 0.5  # nats a token: an export that loses more is broken, not rounded


@dataclass(frozen=True)
class Quality:
    """Perplexity before and after, on the same windows.

    Attributes:
        text: where it came from.
        tokens: predictions scored.
        ppl_before: of the model in torch, float32.
        ppl_after: of the graph.
        excess_nats: loss of the graph above the model's, nats a token.
        excess_stderr: its standard error over windows; None for one window.
    """

    text: str
    tokens: int
    ppl_before: float
    ppl_after: float
    excess_nats: float
    excess_stderr: float | None


def quality_of(text: str, windows: torch.Tensor, before: Sequence[float], after: Sequence[float]) -> Quality:
    """What losses a token of each of (W, window) windows say.

    Raises:
        VerificationError: the export loses more than MOST_LOST.
    """
    excess, stderr = mean_and_stderr([b - a for a, b in zip(before, after, strict=True)])
    if not excess <= MOST_LOST:  # also when it is NaN
        raise VerificationError(
            f"The export loses {excess:.3g} nats a token on {text} against the model (allowed {MOST_LOST}), so nothing "
            "was written. These weights do not take this dtype or quantisation: export without."
        )
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    return Quality(text, tokens, _ppl(before), _ppl(after), excess, stderr)


def _ppl(losses: Sequence[float]) -> float:
    return float(torch.tensor(losses, dtype=torch.float64).mean().exp())
