"""The calls that need sparse tensor cores, and nothing else: what a machine has, and torch's conversion.

Everything around them is plain torch and runs, and is tested, without a GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.sparse import SparseSemiStructuredTensor

from ssmc.runtime.sparse24.backends import HALF, backends_for

FIRST_CAPABILITY = (8, 0)  # Ampere


def why_dense(device: torch.device, dtype: torch.dtype) -> str | None:
    """One sentence on why a 2:4 model runs dense here, None where there are sparse tensor cores for it."""
    if device.type != "cuda":
        return (
            f"2:4 modules run dense: sparse tensor cores are parts of NVIDIA GPUs, and the model is on {device.type}."
        )
    return why_dense_on(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device), dtype)


def why_dense_on(gpu: str, capability: tuple[int, int], dtype: torch.dtype) -> str | None:
    """The same for a GPU of which name and compute capability are known."""
    if capability < FIRST_CAPABILITY:
        number = "".join(map(str, capability))
        return f"2:4 modules run dense: {gpu} (sm_{number}) has no sparse tensor cores; GPUs from sm_80 on have."
    if dtype not in HALF:
        kind = str(dtype).removeprefix("torch.")
        return f"2:4 modules run dense: sparse tensor cores take float16 or bfloat16, and the model is {kind}."
    return None


def to_sparse(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A 2:4 matrix (out, in) as torch's sparse tensor, by every backend that takes it here.

    Returns:
        Backend -> sparse tensor, and for those that refuse: backend -> why.
    """
    made, refused = {}, {}
    for backend in backends_for(*weight.shape):
        try:
            with _backend(backend):
                made[backend] = torch.sparse.to_sparse_semi_structured(weight.contiguous())
        except (RuntimeError, NotImplementedError) as error:
            refused[backend] = first_line(error)
    return made, refused


def first_line(error: Exception) -> str:
    """The first sentence of an exception of torch, without its advice and its stack of C++ frames."""
    return str(error).strip().split("\n")[0].split(". ")[0].rstrip(".") or type(error).__name__


@contextmanager
def _backend(name: str) -> Iterator[None]:
    """Have torch convert for one backend; the choice is a global of torch."""
    before = SparseSemiStructuredTensor._FORCE_CUTLASS
    SparseSemiStructuredTensor._FORCE_CUTLASS = name == "cutlass"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the interface is a prototype
            yield
    finally:
        SparseSemiStructuredTensor._FORCE_CUTLASS = before
