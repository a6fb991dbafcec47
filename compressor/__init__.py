"""One-shot pruning: scores, repair, weight pruning, and the layer-by-layer pipeline.

`compress` is the whole run, of a checkpoint or of a torch module; the other names are its parts, for those who build
on them.
"""

from .compress import CompressResult, compress
from .config import CompressConfig, FfnScore, Weighting, configure
from .counts import Kept, kept, kept_channels, kept_states
from .module import CompressedModule, MixerResult, compress_module
from .modules import ModuleResult, prune_modules
from .patterns import Score
from .pipeline import LayerResult, collect, propagate, prune_layers
from .recipe import read_recipe
from .refinement import Refinement, refine
from .repair import Repair, eliminate, evaluate
from .shedder import Removal, choose_removals, shed
from .target import Target, split_target

__all__ = [
    "CompressConfig",
    "CompressResult",
    "CompressedModule",
    "FfnScore",
    "Kept",
    "LayerResult",
    "MixerResult",
    "ModuleResult",
    "Refinement",
    "Removal",
    "Repair",
    "Score",
    "Target",
    "Weighting",
    "choose_removals",
    "collect",
    "compress",
    "compress_module",
    "configure",
    "eliminate",
    "evaluate",
    "kept",
    "kept_channels",
    "kept_states",
    "propagate",
    "prune_layers",
    "prune_modules",
    "read_recipe",
    "refine",
    "shed",
    "split_target",
]
