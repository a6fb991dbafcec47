"""What a benchmark was asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import UsageError
from ..scan import check_backend


@dataclass(frozen=True)
class Settings:
    """What was asked for; lengths and batch sizes in rising order, each once."""

    lengths: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    decode_tokens: int
    repeats: int  # rounds at most
    time_budget: float  # seconds for all timings together, a guide
    window: int  # tokens, as asked for; Perplexity.window says what was used
    max_windows: int | None
    backend: str  # of the selective scan

    def __post_init__(self) -> None:
        for name in ("lengths", "batch_sizes", "decode_tokens", "repeats", "window", "max_windows"):
            value = getattr(self, name)
            counts = value if isinstance(value, tuple) else (1 if value is None else value,)
            least = 2 if name == "window" else 1
            if not counts or min(counts) < least:
                raise UsageError(f"{name} must be at least {least}, not {', '.join(map(str, counts)) or 'empty'}.")
        check_backend(self.backend)
        for name in ("lengths", "batch_sizes"):
            object.__setattr__(self, name, tuple(sorted(set(getattr(self, name)))))


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
