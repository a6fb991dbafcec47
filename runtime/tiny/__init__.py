"""`tiny`: a small trained Mamba-1 and texts for it, which come with ssmc so that everything runs without a network."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

__all__ = ["TINY_DIRECTORY", "calibration_path", "heldout_path"]

# ssmc is never installed as a zip (numba and torch could not run from one), so the resources are plain files.
TINY_DIRECTORY = Path(str(files(__name__)))
"""A model directory in transformers' layout: float16 weights, configuration and tokenizer."""


def calibration_path() -> Path:
    """Stories the model was trained on: 64 samples of 2048 tokens, for GPT-NeoX's tokenizer as well as for its own."""
    return TINY_DIRECTORY / "calibration.jsonl"


def heldout_path() -> Path:
    """Stories the model never saw, about 40,000 tokens, to measure perplexity on."""
    return TINY_DIRECTORY / "heldout.jsonl"
