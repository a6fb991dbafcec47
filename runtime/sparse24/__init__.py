"""2:4 sparsity: how it is packed, which hardware takes it, and using it where it is faster.

pack24, unpack24   a 2:4 matrix in the space of its values
backends_for       the backends that take a shape
use_sparse24       run the 2:4 modules of a model on sparse tensor cores where that is faster
"""

from __future__ import annotations

from typing import Any

from ssmc.runtime import lazy

_HOMES = lazy.homes(
    {
        "ssmc.runtime.sparse24.backends": "HALF TILES backends_for obstacle",
        "ssmc.runtime.sparse24.packing": "Packed24 is_24 pack24 unpack24",
        "ssmc.runtime.sparse24.use": "ModuleReport Sparse24Linear Sparse24Report use_sparse24",
    }
)
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    return lazy.fetch(__name__, _HOMES, name)
