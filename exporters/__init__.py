"""Turn what `compress` wrote into checkpoints that others load, and prove that they compute the same."""

from .export import FORMATS, ExportResult, export
from .formats import missing_formats
from .runs_where import Runtime, runs_where
from .shrink import Shrunk, shrink
from .verify import Comparison, compare

__all__ = [
    "FORMATS",
    "Comparison",
    "ExportResult",
    "Runtime",
    "Shrunk",
    "compare",
    "export",
    "missing_formats",
    "runs_where",
    "shrink",
]
