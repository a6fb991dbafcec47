"""Selective scans: one interface, a fast CPU kernel behind it, and plain torch wherever that cannot serve."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

import torch

from ..errors import UsageError
from . import reference
from .inputs import ScanInputs

__all__ = ["BACKENDS", "ScanInputs", "check_backend", "scan_states", "selective_scan"]

BACKENDS = ("auto", "cpu", "reference")

_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})  # anything else may have no memory to read


def selective_scan(
    inputs: ScanInputs, state: torch.Tensor | None = None, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the recurrence of one layer and read it out (Mamba, section 3.2; see `ScanInputs`).

    Args:
        inputs: what the scan reads; float16 and bfloat16 are computed in float32.
        state: (B, D, N) state before the first token; None starts from zero. It is not modified.
        backend: "cpu" the numba kernels, "reference" plain torch on any device, "auto" the kernels for CPU tensors and
            the reference for everything else. Both have gradients; those of the kernels cannot be differentiated again.

    Returns:
        Output (B, L, D) in the dtype of `inputs.u`, gated when `inputs.z` is given, and the final state (B, D, N) in
        float32.

    Raises:
        UsageError: there is no such backend, or it cannot take these tensors.
        ValueError: the shapes do not belong together.
    """
    return _choose(backend, inputs, state, "cpu_backward").selective_scan(inputs, state)


def scan_states(inputs: ScanInputs, state: torch.Tensor | None = None, backend: str = "auto") -> torch.Tensor:
    """All hidden states of the recurrence; takes memory for L (D, N) states, so give it one time chunk at a time.

    Args and errors: as `selective_scan`, but only the reference has gradients.

    Returns:
        (B, L + 1, N, D) float32; entry t is the state before token t, so `[:, 1:]` is h_t, `[:, -1]` the final state.
    """
    return _choose(backend, inputs, state).scan_states(inputs, state)


def check_backend(backend: str) -> str:
    """Return `backend` if there is such a one.

    Raises:
        UsageError: there is not.
    """
    if backend not in BACKENDS:
        raise UsageError(f"There is no scan backend {backend!r}: choose one of {', '.join(BACKENDS)}.")
    return backend


def _choose(
    backend: str, inputs: ScanInputs, state: torch.Tensor | None, with_gradients: str | None = None
) -> ModuleType:
    """The module that computes this scan; `with_gradients` names the one of the kernels' that has gradients, if any."""
    if check_backend(backend) == "reference":
        return reference
    tensors = [t for t in (*vars(inputs).values(), state) if t is not None]
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    obstacle = _obstacle(tensors)
    if obstacle is None and grad and with_gradients is None:
        obstacle = "it computes no gradients of all states"
    if obstacle is None:
        _check_shapes(inputs, state)  # the kernels work on raw memory
        return _kernels(with_gradients if grad else "cpu")
    if backend == "cpu":
        raise UsageError(f"The cpu scan cannot run here: {obstacle}. Use backend 'auto' or 'reference'.")
    return reference


def _obstacle(tensors: list[torch.Tensor]) -> str | None:
    """Why the numba kernels cannot take these tensors, or None."""
    for tensor in tensors:
        if not tensor.is_cpu:
            return "a tensor is not in CPU memory"
        if type(tensor) not in _PLAIN:
            return "a tensor is of a special type, without plain memory"
    if _kernels("cpu") is None:
        return "numba cannot be imported"
    return None


@cache
def _kernels(name: str) -> ModuleType | None:
    """A module of numba kernels, imported at first use as numba takes half a second; None if missing or broken."""
    try:
        return import_module(f".{name}", __name__)
    except Exception:  # a numba that does not fit this numpy or Python raises all sorts of errors
        return None


def _check_shapes(inputs: ScanInputs, state: torch.Tensor | None) -> None:
    """Raise ValueError unless all shapes belong together."""
    if inputs.u.dim() != 3 or inputs.A.dim() != 2:
        raise ValueError(f"u must be (B, L, D) and A (D, N), not {tuple(inputs.u.shape)} and {tuple(inputs.A.shape)}")
    sequence = (inputs.batch, inputs.length)
    channels, states = (*sequence, inputs.d_inner), (*sequence, inputs.d_state)
    wanted = {"dt": channels, "z": channels, "B": states, "C": states, "D": channels[2:]}
    wanted["A"] = (inputs.d_inner, inputs.d_state)
    for name, shape in wanted.items():
        tensor = getattr(inputs, name)
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {shape} to go with u and A, not {tuple(tensor.shape)}")
    if state is not None and state.shape != (inputs.batch, inputs.d_inner, inputs.d_state):
        raise ValueError(f"state must be {(inputs.batch, inputs.d_inner, inputs.d_state)}, not {tuple(state.shape)}")
