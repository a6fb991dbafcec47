"""Turn what `compress` wrote into checkpoints that others load, and prove that they compute the same."""

from ssmc.exporters.export import FORMATS, ExportResult, export
from ssmc.exporters.formats import missing_formats
from ssmc.exporters.runs_where import Runtime, runs_where
from ssmc.exporters.shrink import Shrunk, shrink
from ssmc.exporters.verify import Comparison, compare

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
