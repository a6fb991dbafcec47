"""One-shot pruning: scores, repair, and the layer-by-layer pipeline.

`compress` is the whole run; the other names are its parts, for those who build on them.
"""

from .compress import CompressResult, compress
from .config import CompressConfig, Pattern, Score, configure, kept_states
from .pipeline import LayerResult, collect, propagate, prune_states
from .repair import Repair, eliminate, evaluate

__all__ = [
    "CompressConfig",
    "CompressResult",
    "LayerResult",
    "Pattern",
    "Repair",
    "Score",
    "collect",
    "compress",
    "configure",
    "eliminate",
    "evaluate",
    "kept_states",
    "propagate",
    "prune_states",
]
