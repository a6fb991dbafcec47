"""The scan with its state rounded after every token: what decoding with states in fewer bits computes, for whole texts.

On a CPU a numba kernel walks over time with the states of one head; elsewhere the scan runs a token at a time.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

from ssmc.runtime.later import torch
from ssmc.runtime.scan.inputs import ScanInputs, SsdInputs
from ssmc.runtime.scan.rounding import StateFormat, pack, unpack

if TYPE_CHECKING:
    from collections.abc import Callable

_Inputs = TypeVar("_Inputs", ScanInputs, SsdInputs)


def rounded_scan(
    inputs: _Inputs,
    state: torch.Tensor | None,
    form: StateFormat,
    scan: Callable[[_Inputs, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a scan and round the state after every token but the last, whose state the caller rounds when it keeps it.

    Args:
        inputs: what the scan reads, time steps ready.
        state: before the first token, as it was unpacked; None starts from zero.
        form: how the state is kept.
        scan: the same scan without rounding.

    Returns:
        As `scan`: the output (B, L, D) and the state after the last token, float32.
    """
    tensors = [t for t in (*vars(inputs).values(), state) if isinstance(t, torch.Tensor)]
    if all(t.is_cpu for t in tensors) and (kernels := _kernels()) is not None:
        return kernels.rounded_scan(inputs, state, form)
    state, outputs = inputs.initial_state() if state is None else state, []
    for t in range(inputs.length):
        y, state = scan(_token(inputs, slice(t, t + 1)), unpack(*pack(state, form)) if t else state)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


def _token(inputs: _Inputs, at: slice) -> _Inputs:
    """The same inputs for some tokens only."""
    z = None if inputs.z is None else inputs.z[:, at]
    return replace(inputs, u=inputs.u[:, at], dt=inputs.dt[:, at], B=inputs.B[:, at], C=inputs.C[:, at], z=z)


@cache
def _kernels() -> ModuleType | None:
    """The numba kernels, imported at first use; None where numba is missing or broken."""
    try:
        return import_module("ssmc.runtime.scan.rounded_cpu")
    except Exception:  # as for the other kernels: a numba that does not fit raises all sorts of errors
        return None
