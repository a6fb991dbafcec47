"""Calibration samples: windows of real text, chosen by a seed, all with the same weight."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ssmc.runtime.errors import CalibrationError
from ssmc.runtime.text import draw_windows


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


def draw_samples(source: str | Path, tokenizer: Any, nsamples: int, seqlen: int, seed: int) -> Calibration:
    """Draw `nsamples` windows of text that do not overlap, without replacement.

    Args:
        source: as in `read_texts`; of a large text only what is drawn is read, see `draw_windows`.
        tokenizer: the model's.
        nsamples: how many windows; fewer are returned when the text has fewer.
        seqlen: tokens per window.
        seed: of the draw.

    Raises:
        CalibrationError: there is no text, or it does not fill a single window.
    """
    drawn = draw_windows(source, tokenizer, nsamples, seqlen, seed)
    if not len(drawn.tokens):
        raise CalibrationError(
            f"{source} has {drawn.available} tokens, one calibration sample needs {seqlen}. "
            f"Give more text with --calib or use a smaller --seqlen."
        )
    return Calibration(drawn.tokens, drawn.source, drawn.sha256, nsamples)
