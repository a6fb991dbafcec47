"""`tiny-hybrid`: a small trained hybrid that comes with ssmc; it shares `tiny`'s tokenizer and texts."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

__all__ = ["TINY_HYBRID_DIRECTORY"]

TINY_HYBRID_DIRECTORY = Path(str(files(__name__)))
"""A model directory in transformers' layout: float16 weights and configuration; the tokenizer lies with `tiny`."""
