"""RMS norms of stock models in one kernel on a GPU, where transformers takes eight."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from ssmc.runtime.scan.accelerators import MAMBA_SSM, accelerator, needs_gradients

_MARK = "_ssmc_norm"  # attribute of a norm that holds the backend
_NORMED = "_ssmc_normed"  # attribute of a tensor: a norm, and what that makes of the tensor
EPSILON = (
    "variance_epsilon"  # attribute of all norms of this form, weight x / sqrt(mean(x^2) + epsilon), and only those
)


def use_fast_norms(model: nn.Module, backend: str) -> None:
    """Let the plain RMS norms of a model run as one kernel where its tensors are on a GPU; in place.

    Args:
        model: a transformers model.
        backend: as of `use_fast_scan`.
    """
    for norm in _norms(model):
        if _MARK in vars(norm) or "forward" not in vars(norm):
            norm.forward = partial(_forward, norm)
            setattr(norm, _MARK, backend)


def use_stock_norms(model: nn.Module) -> None:
    """Undo `use_fast_norms`."""
    for norm in _norms(model):
        if _MARK in vars(norm):
            delattr(norm, _MARK)
            del norm.forward


def _norms(model: nn.Module) -> list[nn.Module]:
    names = [type(m).__name__ for m in model.modules()]
    return [m for m, name in zip(model.modules(), names, strict=True) if name.endswith("RMSNorm") and is_plain_norm(m)]


def is_plain_norm(module: nn.Module) -> bool:
    """Whether a module has the form of these norms."""
    parameters = dict(module.named_parameters())
    return hasattr(module, EPSILON) and list(parameters) == ["weight"] and parameters["weight"].ndim == 1


def runs_on_gpu(backend: str, tensors: Sequence[torch.Tensor]) -> bool:
    """Whether the kernels of this file's kind take these tensors: on a GPU, with no gradients to record."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or backend in ("cpu", "reference", MAMBA_SSM):
        return False
    return not needs_gradients(tensors) and accelerator(backend, tensors) is not None


def keep_normed(hidden: torch.Tensor, norm: nn.Module, normed: torch.Tensor) -> None:
    """Leave with a tensor what a norm makes of it, for the next call of that norm."""
    setattr(hidden, _NORMED, (norm, normed))


def has_normed(hidden: torch.Tensor, norm: nn.Module) -> bool:
    """Whether what this norm makes of a tensor is there already."""
    return getattr(hidden, _NORMED, (None,))[0] is norm


def _forward(norm: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """The forward of a norm, (..., D) to the same."""
    if has_normed(hidden_states, norm):
        return vars(hidden_states).pop(_NORMED)[1]
    if not runs_on_gpu(getattr(norm, _MARK), [hidden_states, norm.weight]):
        return type(norm).forward(norm, hidden_states)
    from ssmc.runtime.scan.gpu.step import rms_norm  # imports triton, which is there

    return rms_norm(hidden_states, norm.weight, getattr(norm, EPSILON))
