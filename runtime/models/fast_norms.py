"""RMS norms of stock models in one kernel on a GPU, where transformers takes eight."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from ssmc.runtime.scan.accelerators import MAMBA_SSM, accelerator, needs_gradients

_MARK = "_ssmc_norm"  # attribute of a norm that holds the backend
_EPSILON = (
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
    return [m for m, name in zip(model.modules(), names, strict=True) if name.endswith("RMSNorm") and _plain(m)]


def _plain(module: nn.Module) -> bool:
    parameters = dict(module.named_parameters())
    return hasattr(module, _EPSILON) and list(parameters) == ["weight"] and parameters["weight"].ndim == 1


def _forward(norm: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """The forward of a norm, (..., D) to the same."""
    backend, tensors = getattr(norm, _MARK), [hidden_states, norm.weight]
    stock = torch.compiler.is_compiling() or torch.jit.is_tracing() or backend in ("cpu", "reference", MAMBA_SSM)
    if stock or needs_gradients(tensors) or accelerator(backend, tensors) is None:
        return type(norm).forward(norm, hidden_states)
    from ssmc.runtime.scan.gpu.step import rms_norm  # imports triton, which is there

    return rms_norm(hidden_states, norm.weight, getattr(norm, _EPSILON))
