"""2:4 sparsity: how it is packed, which hardware takes it, and using it where it is faster.

pack24, unpack24   a 2:4 matrix in the space of its values
backends_for       the backends that take a shape
use_sparse24       run the 2:4 modules of a model on sparse tensor cores where that is faster
"""

from ssmc.runtime.sparse24.backends import HALF, TILES, backends_for, obstacle
from ssmc.runtime.sparse24.packing import Packed24, is_24, pack24, unpack24
from ssmc.runtime.sparse24.use import ModuleReport, Sparse24Linear, Sparse24Report, use_sparse24

__all__ = [
    "HALF",
    "TILES",
    "ModuleReport",
    "Packed24",
    "Sparse24Linear",
    "Sparse24Report",
    "backends_for",
    "is_24",
    "obstacle",
    "pack24",
    "unpack24",
    "use_sparse24",
]
