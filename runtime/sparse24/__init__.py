"""2:4 sparsity: how it is packed, which hardware takes it, and using it where it is faster.

pack24, unpack24   a 2:4 matrix in the space of its values
backends_for       the backends that take a shape
"""

from .backends import HALF, TILES, backends_for, obstacle
from .packing import Packed24, is_24, pack24, unpack24

__all__ = ["HALF", "TILES", "Packed24", "backends_for", "is_24", "obstacle", "pack24", "unpack24"]
