"""Selective scans: one interface, a fast CPU kernel behind it, and plain torch wherever that cannot serve."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch

from ..errors import UsageError
from . import reference
from .accelerators import accelerator
from .inputs import ScanInputs

__all__ = ["BACKENDS", "ScanInputs", "accelerator", "check_backend", "scan_states", "selective_scan"]

BACKENDS = ("auto", "cpu", "triton", "mamba-ssm", "reference")

_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})  # anything else may have no memory to read


def selective_scan(
    inputs: ScanInputs, state: torch.Tensor | None = None, backend: str = "auto", in_place: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the recurrence of one layer and read it out (Mamba, section 3.2; see `ScanInputs`).

    Args:
        inputs: what the scan reads; float16 and bfloat16 are computed in float32.
        state: (B, D, N) state before the first token; None starts from zero. It is not modified.
        backend: "cpu" the numba kernel, "triton" our kernels for a GPU, "mamba-ssm" that package's where it is
            installed, "reference" plain torch on any device and with gradients, "auto" the numba kernel for CPU
            tensors, Triton for those of a GPU, and the reference for everything else. Where gradients are needed,
            the two for a GPU leave it to the reference.
        in_place: allow the state of a single token to be overwritten with the final one, where that saves time.

    Returns:
        Output (B, L, D) in the dtype of `inputs.u`, gated when `inputs.z` is given, and the final state (B, D, N) in
        float32.

    Raises:
        UsageError: there is no such backend, or it cannot take these tensors.
        ValueError: the shapes do not belong together.
    """
    module, inputs = _choose(backend, inputs, state)
    if in_place and getattr(module, "FUSES_TIME_STEPS", False):
        return module.selective_scan(inputs, state, in_place=True)
    return module.selective_scan(inputs, state)


def scan_states(inputs: ScanInputs, state: torch.Tensor | None = None, backend: str = "auto") -> torch.Tensor:
    """All hidden states of the recurrence; takes memory for L (D, N) states, so give it one time chunk at a time.

    Args and errors: as `selective_scan`.

    Returns:
        (B, L + 1, N, D) float32; entry t is the state before token t, so `[:, 1:]` is h_t, `[:, -1]` the final state.
    """
    module, inputs = _choose(backend, inputs, state)
    return module.scan_states(inputs, state)


def check_backend(backend: str) -> str:
    """Return `backend` if there is such a one.

    Raises:
        UsageError: there is not.
    """
    if backend not in BACKENDS:
        raise UsageError(f"There is no scan backend {backend!r}: choose one of {', '.join(BACKENDS)}.")
    return backend


def _choose(backend: str, inputs: ScanInputs, state: torch.Tensor | None) -> tuple[ModuleType, ScanInputs]:
    """The module that computes this scan, and the inputs as it takes them."""
    tensors = [t for t in (*vars(inputs).values(), state) if t is not None]
    on_gpu = accelerator(check_backend(backend), tensors)
    if on_gpu is not None:
        _check_shapes(inputs, state)
        return on_gpu, inputs
    inputs = inputs.with_time_steps()
    if backend not in ("auto", "cpu"):
        return reference, inputs
    obstacle = _obstacle(tensors)
    if obstacle is None:
        _check_shapes(inputs, state)  # the kernel works on raw memory
        return _kernels(), inputs
    if backend == "cpu":
        raise UsageError(f"The cpu scan cannot run here: {obstacle}. Use backend 'auto' or 'reference'.")
    return reference, inputs


def _obstacle(tensors: list[torch.Tensor]) -> str | None:
    """Why the numba kernel cannot take these tensors, or None."""
    grad = torch.is_grad_enabled()
    for tensor in tensors:
        if not tensor.is_cpu:
            return "a tensor is not in CPU memory"
        if type(tensor) not in _PLAIN:
            return "a tensor is of a special type, without plain memory"
        if grad and tensor.requires_grad:
            return "it computes no gradients"
    if _kernels() is None:
        return "numba cannot be imported"
    return None


@cache
def _kernels() -> ModuleType | None:
    """The numba kernels, imported at first use as numba takes half a second; None where it is missing or broken."""
    try:
        from . import cpu
    except Exception:  # a numba that does not fit this numpy or Python raises all sorts of errors
        return None
    return cpu


def _check_shapes(inputs: ScanInputs, state: torch.Tensor | None) -> None:
    """Raise ValueError unless all shapes belong together."""
    if inputs.u.dim() != 3 or inputs.A.dim() != 2:
        raise ValueError(f"u must be (B, L, D) and A (D, N), not {tuple(inputs.u.shape)} and {tuple(inputs.A.shape)}")
    sequence = (inputs.batch, inputs.length)
    channels, states = (*sequence, inputs.d_inner), (*sequence, inputs.d_state)
    wanted = {"dt": channels, "z": channels, "B": states, "C": states, "D": channels[2:], "dt_bias": channels[2:]}
    wanted["A"] = (inputs.d_inner, inputs.d_state)
    for name, shape in wanted.items():
        tensor = getattr(inputs, name)
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {shape} to go with u and A, not {tuple(tensor.shape)}")
    if state is not None and state.shape != (inputs.batch, inputs.d_inner, inputs.d_state):
        raise ValueError(f"state must be {(inputs.batch, inputs.d_inner, inputs.d_state)}, not {tuple(state.shape)}")
