"""Stock models beside mamba_ssm and causal_conv1d: their CUDA functions get the tensors they take, torch all others.

transformers binds the functions of these packages when it imports one of its Mamba modules, whatever the device, so
that where they are installed every forward on a CPU ends in "Expected x.is_cuda() to be true". Here the names in such a
module get a function that looks at the tensors first. CUDA tensors go where they went before.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn

PACKAGES = ("mamba_ssm", "causal_conv1d")
_STOCK = "transformers."
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # that the packages compute in
_WIDTHS = (2, 3, 4)  # of causal_conv1d's filters
_ALIGNED = 8  # channels, where they lie together


def guard_kernels(model: nn.Module) -> nn.Module:
    """Make the forward of a stock model run on whatever device its tensors are.

    What is changed are names in transformers' own modules, for every model of that family in this process. Where the
    packages are not installed, or transformers chooses by device itself, nothing is.

    Args:
        model: any module; those of its parts count whose classes are transformers'.

    Returns:
        The same model.
    """
    for name in sorted({type(part).__module__ for part in model.modules()}):
        if name.startswith(_STOCK) and name in sys.modules:
            _guard(sys.modules[name])
    return model


def _guard(module: ModuleType) -> None:
    for name, bound in list(vars(module).items()):
        function = _function_of(bound)
        plain = getattr(function, "__wrapped__", None)
        if inspect.isfunction(function) and plain is not None and (package := _package(function)):
            setattr(module, name, _by_tensors(bound, plain, filters=package == "causal_conv1d"))


def _function_of(bound: Any) -> Any:
    """What `bound` is, or the function of which the package `kernels` has made a torch module."""
    if not isinstance(bound, nn.Module):
        return bound
    held = _held(type(bound).forward)
    return held[0] if len(held) == 1 else bound


def _package(function: Callable) -> str | None:
    """Whose function transformers' wrapper calls in place of its own, or None."""
    packages = {str(getattr(other, "__module__", "")).split(".")[0] for other in _held(function)}
    return next((package for package in PACKAGES if package in packages), None)


def _held(function: Any) -> list[Callable]:
    """The functions that a function closes over."""
    cells = getattr(function, "__closure__", None) or ()
    return [cell.cell_contents for cell in cells if callable(cell.cell_contents)]


def _by_tensors(bound: Callable, plain: Callable, filters: bool) -> Callable:
    """`bound` for the tensors it takes, `plain` for all others."""

    @functools.wraps(plain)
    def run(*args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        taken = all(map(_takes, tensors)) and not (filters and _odd_filter(tensors))
        return (bound if taken else plain)(*args, **kwargs)

    return run


def _takes(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and (tensor.dtype in _DTYPES or not tensor.is_floating_point())


def _odd_filter(tensors: list[torch.Tensor]) -> bool:
    """Whether causal_conv1d refuses these tensors: a width it has no kernel for, or channels that do not fill loads."""
    x, weight = tensors[0], next(tensor for tensor in tensors if tensor.ndim == 2)  # (B, D, L), (D, K)
    together = x.ndim == 3 and x.stride(1) == 1 and x.stride(2) > 1
    odd = together and any(size % _ALIGNED for size in (x.shape[1], x.stride(0), x.stride(2)))
    return odd or weight.shape[1] not in _WIDTHS
