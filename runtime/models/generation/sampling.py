"""How the next token is chosen from logits: the likeliest, or drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ssmc.runtime.errors import UsageError

DRAWN_TOGETHER = 64
"""Random numbers of a sequence that are drawn at once."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: greedily, unless a temperature, top_k or top_p is given.

    Attributes:
        temperature: what logits are divided by; 0 is greedy, None is 1 where top_k or top_p are given.
        top_k: draw from the k likeliest tokens.
        top_p: draw from the fewest likeliest tokens that together have this probability.
        seed: of the draws; sequence i of a batch draws with seed + i, whatever the others do.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature is not None and not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"The temperature must be 0 (greedy) or a number above, not {self.temperature}.")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"top_k must be at least 1, not {self.top_k}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must be above 0 and at most 1, not {self.top_p}.")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"The seed must be 0 or a whole number above, not {self.seed}.")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == 0 or (self.temperature, self.top_k, self.top_p) == (None, None, None)

    def chooser(self, batch: int) -> Chooser:
        """What chooses the next tokens of `batch` sequences, with generators of its own."""
        return Chooser(self, batch)

    def choose(self, logits: torch.Tensor, numbers: torch.Tensor | None) -> torch.Tensor:
        """Tokens (B,) of logits (B, V), where these are and without waiting for them, so that a GPU can record it.

        Args:
            logits: of the next tokens.
            numbers: (B,) from 0 to below 1, for each sequence; None where nothing is drawn. A token is drawn by the
                inverse of the distribution function.
        """
        if numbers is None:
            return logits.argmax(dim=-1)
        probabilities = self._warpers()(None, logits.float()).softmax(dim=-1)
        upto = probabilities.cumsum(dim=-1, dtype=torch.float64)  # (B, V)
        tokens = torch.searchsorted(upto, numbers.double()[:, None] * upto[:, -1:], right=True)[:, 0]
        return tokens.clamp(max=logits.shape[-1] - 1)  # beyond the last where the logits are no numbers

    def _warpers(self) -> LogitsProcessorList:
        """transformers' own, in the order in which `model.generate` applies them."""
        warpers = LogitsProcessorList()
        if self.temperature is not None and self.temperature != 1:
            warpers.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k is not None:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p is not None and self.top_p < 1:
            warpers.append(TopPLogitsWarper(self.top_p))
        return warpers


class Chooser:
    """Chooses the next tokens of B sequences, one after the other.

    Attributes:
        sampling: how.
    """

    def __init__(self, sampling: Sampling, batch: int):
        self.sampling = sampling
        self._generators = [torch.Generator().manual_seed(sampling.seed + row) for row in range(batch)]
        self._drawn, self._left = torch.empty(batch, 0), 0

    def numbers(self, device: torch.device) -> torch.Tensor | None:
        """What the next choice takes, (B,) float32; None if that is greedy.

        The generators are the CPU's, so that a seed draws the same numbers everywhere.
        """
        if self.sampling.greedy:
            return None
        if not self._left:
            self._left = DRAWN_TOGETHER
            rows = [torch.rand(self._left, generator=generator) for generator in self._generators]
            self._drawn = torch.stack(rows).to(device)
        self._left -= 1
        return self._drawn[:, -1 - self._left]

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """From logits (B, V), wherever they are, to tokens (B,) on the CPU."""
        return self.sampling.choose(logits, self.numbers(logits.device)).cpu()
