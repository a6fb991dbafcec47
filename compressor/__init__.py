"""One-shot pruning: scores, repair, weight pruning, and the layer-by-layer pipeline.

`compress` is the whole run, of a checkpoint or of a torch module; the other names are its parts, for those who build
on them.
"""

from __future__ import annotations

from typing import Any

from ssmc.runtime import lazy

_HOMES = lazy.homes(
    {
        "ssmc.compressor.run": "CompressResult compress",
        "ssmc.compressor.counts": "Kept kept kept_channels kept_states",
        "ssmc.compressor.methods.layers": "Removal choose_removals shed",
        "ssmc.compressor.methods.refine": "Refinement refine",
        "ssmc.compressor.methods.states.elimination": "Repair eliminate evaluate",
        "ssmc.compressor.methods.weights.projections": "ModuleResult prune_modules",
        "ssmc.compressor.options.config": "CompressConfig FfnScore Weighting configure",
        "ssmc.compressor.options.goal": "Target split_target",
        "ssmc.compressor.options.patterns": "Score",
        "ssmc.compressor.options.recipe": "read_recipe",
        "ssmc.compressor.pipeline": "LayerResult collect propagate prune_layers",
        "ssmc.compressor.torch_module.compress_module": "CompressedModule MixerResult compress_module",
    }
)
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    return lazy.fetch(__name__, _HOMES, name)
