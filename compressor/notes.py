"""What a user should know about a run besides its result: one sentence each, those of its methods among them."""

from __future__ import annotations

from ssmc.compressor.methods.method import Outcome
from ssmc.runtime.models.checkpoints import EMBEDDED

FEW_TOKENS = 32  # different ones, in all calibration samples; a paragraph of prose has more


def notes_for(outcome: Outcome) -> list[str]:
    """Sentences about a run that is over."""
    config, keep, calibration = outcome.plan.config, outcome.plan.keep, outcome.calibration
    notes = []
    if calibration and calibration.shortfall:
        notes.append(calibration.shortfall)
    if calibration and config.calib is None and config.model not in EMBEDDED:
        notes.append(
            "Calibrated on the embedded sample of simple stories. For a model of real text give text like what it "
            "will read: --calib wikitext2 or a file."
        )
    if calibration and (different := len(calibration.tokens.unique())) < FEW_TOKENS:
        notes.append(
            f"The calibration text has only {different} different tokens: what it cannot determine stays near what it "
            "was. Give more text, of more kinds, with --calib."
        )
    for step in outcome.plan.steps:
        notes += step.notes(outcome)
    if len(set(keep.channels)) > 1 or len(set(keep.states)) > 1:
        notes.append(
            "Layers keep numbers of their own. Stock loaders have one for all, so `ssmc export` fills the narrower "
            "ones up with zeros to the widest: nothing is gained there. `--format onnx` takes each layer as it is."
        )
    return notes
