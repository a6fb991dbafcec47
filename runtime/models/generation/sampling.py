"""How the next token is chosen from logits: the likeliest, or drawn."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ssmc.runtime.errors import UsageError

Choose = Callable[[torch.Tensor], torch.Tensor]
"""From logits (B, V), wherever they are, to tokens (B,) on the CPU."""


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

    def chooser(self, batch: int) -> Choose:
        """A function that chooses the next tokens of `batch` sequences, with generators of its own."""
        if self.greedy:
            return lambda logits: logits.argmax(dim=-1).cpu()
        warpers = self._warpers()
        generators = [torch.Generator().manual_seed(self.seed + row) for row in range(batch)]

        def draw(logits: torch.Tensor) -> torch.Tensor:
            probabilities = warpers(None, logits.float()).softmax(dim=-1).cpu()  # (B, V)
            rows = zip(probabilities, generators, strict=True)
            return torch.cat([torch.multinomial(row, 1, generator=generator) for row, generator in rows])

        return draw

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
