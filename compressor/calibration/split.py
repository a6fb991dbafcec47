"""The text of a search: samples that trials are fitted to, and others that their losses are measured on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ssmc.runtime.errors import CalibrationError

TRIAL_SAMPLES, TRIAL_TOKENS = 8, 8192  # calibration samples a trial is fitted to, and tokens of them, at most
HELD_OUT = 8  # and those its loss is measured on


@dataclass(frozen=True)
class Samples:
    """Text for trials."""

    fit: torch.Tensor  # (n, seqlen), the first of the calibration samples
    held_out: torch.Tensor  # (m, seqlen), which no trial is fitted to
    taught: torch.Tensor  # (k, seqlen), what gradient steps in trials may see: all but those
    seen: bool  # whether the final run is calibrated on `held_out` too, for lack of text

    @property
    def notes(self) -> list[str]:
        """What the losses measured here lack, in sentences."""
        if not self.seen:
            return []
        return [
            "The calibration text has no samples to spare, so the loss was measured on some that the run was "
            "calibrated on too. Give more text with --calib or use fewer with --nsamples."
        ]

    @classmethod
    def split(cls, tokens: torch.Tensor, nsamples: int) -> Samples:
        """Out of (n, seqlen) samples, of which the final run takes the first `nsamples`.

        Raises:
            CalibrationError: there are fewer than two.
        """
        if len(tokens) < 2:
            raise CalibrationError(
                "A search with a goal needs at least two calibration samples, one of them to measure losses on. Give "
                "more text with --calib or use a smaller --seqlen."
            )
        seen = len(tokens) <= nsamples
        first = len(tokens) - min(HELD_OUT, len(tokens) // 2) if seen else nsamples
        fit = min(TRIAL_SAMPLES, max(2, TRIAL_TOKENS // tokens.shape[1]))
        return cls(tokens[:first][:fit], tokens[first:][:HELD_OUT], tokens[:first], seen)
