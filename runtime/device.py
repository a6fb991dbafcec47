"""Where to compute, and in which dtype."""

from __future__ import annotations

import torch

from ssmc.runtime.errors import UsageError


def choose_device(name: str) -> torch.device:
    """The device "cpu", "cuda" or "auto" stands for.

    Raises:
        UsageError: there is no such device.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f"There is no device {name!r}; there are auto, cpu and cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("The device cuda was asked for, but torch sees no CUDA device. Use cpu or auto.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def choose_dtype(dtype: torch.dtype | None, device: torch.device) -> torch.dtype | None:
    """float32 on a CPU, where half precision is slow and often missing; None, the stored one, on a GPU."""
    return torch.float32 if dtype is None and device.type == "cpu" else dtype
