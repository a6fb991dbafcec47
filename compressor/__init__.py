"""One-shot pruning: scores, repair, weight pruning, and the layer-by-layer pipeline.

`compress` is the whole run, of a checkpoint or of a torch module; the other names are its parts, for those who build
on them.
"""

from ssmc.compressor.compress import CompressResult, compress
from ssmc.compressor.counts import Kept, kept, kept_channels, kept_states
from ssmc.compressor.methods.layers import Removal, choose_removals, shed
from ssmc.compressor.methods.refine import Refinement, refine
from ssmc.compressor.methods.states.elimination import Repair, eliminate, evaluate
from ssmc.compressor.methods.weights.projections import ModuleResult, prune_modules
from ssmc.compressor.options.config import CompressConfig, FfnScore, Weighting, configure
from ssmc.compressor.options.goal import Target, split_target
from ssmc.compressor.options.patterns import Score
from ssmc.compressor.options.recipe import read_recipe
from ssmc.compressor.pipeline import LayerResult, collect, propagate, prune_layers
from ssmc.compressor.torch_module.compress_module import CompressedModule, MixerResult, compress_module

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
