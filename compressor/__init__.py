"""One-shot pruning: methods, their options, the pipeline that carries them out, and the search for a goal.

`compress` is the whole run, of a checkpoint or of a torch module; the other names are its parts, for those who build
on them. The methods are registered when this is imported, which takes no torch; the names below load what they need
when they are first used.
"""

from __future__ import annotations

from typing import Any

import ssmc.compressor.methods  # noqa: F401  (registers the built-in methods and scores)
from ssmc.runtime import lazy

_HOMES = lazy.homes(
    {
        "ssmc.compressor.run": "CompressResult compress",
        "ssmc.compressor.options.config": "CompressConfig Weighting configure",
        "ssmc.compressor.options.goal": "Goal split_goal",
        "ssmc.compressor.options.recipe": "read_recipe",
        "ssmc.compressor.pipeline": "Run prune",
        "ssmc.compressor.plan": "make_plan",
        "ssmc.compressor.torch_module.compress_module": "CompressedModule compress_module",
        "ssmc.compressor.torch_module.mixer": "MixerResult",
    }
)
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    return lazy.fetch(__name__, _HOMES, name)
