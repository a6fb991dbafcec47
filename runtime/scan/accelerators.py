"""Which scan runs on a GPU: our Triton kernels, mamba-ssm's own where it is installed, or neither and why."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from types import ModuleType

from ssmc.runtime.errors import UsageError
from ssmc.runtime.later import torch

TRITON, MAMBA_SSM = "triton", "mamba-ssm"
_MODULES = {TRITON: ".gpu", MAMBA_SSM: ".mamba_ssm_scan"}
_OLDEST_TRITON = (3, 6)  # older ones were not tried: other tuples, other layouts of registers


def accelerator(backend: str, tensors: Sequence[torch.Tensor], gradients: bool = False) -> ModuleType | None:
    """The module that runs a scan of these tensors on a GPU, or None where the CPU kernel or the reference shall.

    Args:
        backend: one of `BACKENDS`. "auto" takes Triton for CUDA tensors if it is there.
        tensors: what the scan reads.
        gradients: whether Triton's scan of this kind has gradients; otherwise tensors that need them get None.

    Raises:
        UsageError: the backend was asked for by name and cannot run here.
    """
    if backend not in ("auto", *_MODULES) or (needs_gradients(tensors) and not (gradients and backend != MAMBA_SSM)):
        return None
    if backend == "auto":
        usable = all(tensor.is_cuda for tensor in tensors) and _obstacle(TRITON, tensors) is None
        return _module(TRITON) if usable else None
    obstacle = _obstacle(backend, tensors)
    if obstacle is not None:
        raise UsageError(f"The {backend} scan cannot run here: {obstacle}. Use backend 'auto' or 'reference'.")
    return _module(backend)


def accelerates(module: ModuleType) -> bool:
    """Whether this is a module that `accelerator` returned: it takes dt before softplus, and updates in place."""
    return module.__name__ in {f"{__package__}{name}" for name in _MODULES.values()}


def needs_gradients(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether autograd records what is done with these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _obstacle(backend: str, tensors: Sequence[torch.Tensor]) -> str | None:
    """Why this backend cannot take these tensors, or None."""
    if any(not is_plain(tensor) for tensor in tensors):
        return "a tensor is of a special type, without plain memory"
    devices = {tensor.device.type for tensor in tensors}
    if devices == {"cpu"}:
        if backend == TRITON and _missing(TRITON) is None and _module(TRITON).INTERPRETED:
            return None
        return "its kernels need a GPU and the tensors are in CPU memory" + (
            " (only tests run them there, with TRITON_INTERPRET=1)" if backend == TRITON else ""
        )
    if devices != {"cuda"}:
        return "a tensor is not in a GPU's memory"
    return _missing(backend)


@cache
def _missing(backend: str) -> str | None:
    """What keeps a backend from being imported, or None."""
    if backend == TRITON:
        try:
            from triton import __version__
        except Exception as error:  # broken installations raise all sorts of errors
            return f"triton cannot be imported ({error}); it comes with PyTorch for CUDA on Linux"
        if tuple(int(part) for part in __version__.split(".")[:2]) < _OLDEST_TRITON:
            return f"triton {__version__} is too old, 3.6 is the first that was tried"
    try:
        module = import_module(_MODULES[backend], __package__)
        if backend == MAMBA_SSM:
            module.kernels()
    except Exception as error:
        return f"{backend}'s kernels cannot be imported ({type(error).__name__}: {error})"
    return None


def _module(backend: str) -> ModuleType:
    return import_module(_MODULES[backend], __package__)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether it is a tensor and nothing that only acts as one, which may have no memory to read."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter)
