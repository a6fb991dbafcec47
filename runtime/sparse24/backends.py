"""Which 2:4 matrices the sparse tensor cores take, by backend.

torch.sparse knows two (torch/sparse/semi_structured.py, 2.13): cuSPARSELt, which it uses unless told otherwise, and
CUTLASS. Both want matrices of float16 or bfloat16 whose sizes are multiples of their tile.
"""

from __future__ import annotations

import torch

HALF = (torch.float16, torch.bfloat16)

TILES = {"cusparselt": (16, 16), "cutlass": (32, 64)}
"""Backend -> what rows (outputs) and columns (inputs) of a float16 or bfloat16 matrix must be multiples of."""

UNCALLED = {
    "conv1d": "a depthwise convolution is no matrix product",
    "dt_proj": "the model multiplies by its weight directly, which sparse tensors cannot take part in",
}
"""Modules of a mixer that stay dense whatever their shape."""


def backends_for(rows: int, columns: int) -> tuple[str, ...]:
    """The backends that take a float16 or bfloat16 matrix (rows, columns), the default one first."""
    return tuple(name for name, (r, c) in TILES.items() if rows and columns and not (rows % r or columns % c))


def obstacle(name: str, shape: tuple[int, ...]) -> str | None:
    """Why no backend can run a 2:4 module sparse, or None.

    Args:
        name: of the module in its mixer, "in_proj".
        shape: of its weight, (out, in).
    """
    if name in UNCALLED:
        return UNCALLED[name]
    if len(shape) == 2 and backends_for(*shape):
        return None
    size = " x ".join(map(str, shape))
    wanted = " or ".join(f"{r} and {c} ({backend})" for backend, (r, c) in TILES.items())
    return f"no backend takes {size}: outputs and inputs must be multiples of {wanted}"
