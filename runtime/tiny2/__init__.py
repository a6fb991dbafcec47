"""`tiny-mamba2`: a small trained Mamba-2 that comes with ssmc; it shares `tiny`'s tokenizer and texts."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

__all__ = ["TINY2_DIRECTORY"]

TINY2_DIRECTORY = Path(str(files(__name__)))
"""A model directory in transformers' layout: float16 weights and configuration; the tokenizer lies with `tiny`."""
