"""Calibration samples: windows of real text, chosen by a seed, all with the same weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ssmc.runtime.errors import CalibrationError
from ssmc.runtime.text import Texts, tokenize


@dataclass(frozen=True)
class Calibration:
    """What the statistics are computed on."""

    tokens: torch.Tensor  # (nsamples, seqlen) int64
    source: str
    sha256: str  # of the documents the windows were cut from
    requested: int  # samples asked for; `tokens` may hold fewer

    @property
    def shortfall(self) -> str | None:
        """A sentence for the user when there was too little text, else None."""
        found, seqlen = self.tokens.shape
        if found == self.requested:
            return None
        return (
            f"{self.source} holds only {found} samples of {seqlen} tokens, {self.requested} were asked for; "
            "fewer than 16 cost quality. Give more text with --calib or use a smaller --seqlen."
        )


def draw_samples(texts: Texts, tokenizer: Any, nsamples: int, seqlen: int, seed: int) -> Calibration:
    """Cut the text into windows that do not overlap and draw `nsamples` of them without replacement.

    Args:
        texts: documents, taken as one stream.
        tokenizer: the model's.
        nsamples: how many windows; fewer are returned when the text has fewer.
        seqlen: tokens per window.
        seed: of the draw.

    Raises:
        CalibrationError: the text does not fill a single window.
    """
    stream = tokenize(texts, tokenizer)
    windows = stream[: len(stream) // seqlen * seqlen].view(-1, seqlen)
    if not len(windows):
        raise CalibrationError(
            f"{texts.source} has {len(stream)} tokens, one calibration sample needs {seqlen}. "
            f"Give more text with --calib or use a smaller --seqlen."
        )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return Calibration(windows[order[:nsamples]], texts.source, texts.sha256, nsamples)
