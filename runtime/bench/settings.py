"""What a benchmark was asked for."""

from __future__ import annotations

from dataclasses import dataclass

from ssmc.runtime.errors import UsageError
from ssmc.runtime.scan import check_backend
from ssmc.runtime.scan.rounding import state_format


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
    max_batch: int = 0  # of the sweep over batch sizes, 1, 2, 4, ...; 0: no sweep

    state_dtype: str = "float32"  # how SSM states are kept between tokens, of torch's models but the dense one

    def state_dtype_of(self, dense: bool) -> str:
        """Of one model."""
        return "float32" if dense else self.state_dtype

    def __post_init__(self) -> None:
        state_format(self.state_dtype)
        for name in ("lengths", "batch_sizes", "decode_tokens", "repeats", "window", "max_windows"):
            value = getattr(self, name)
            counts = value if isinstance(value, tuple) else (1 if value is None else value,)
            least = 2 if name == "window" else 1
            if not counts or min(counts) < least:
                raise UsageError(f"{name} must be at least {least}, not {', '.join(map(str, counts)) or 'empty'}.")
        if self.max_batch < 0:
            raise UsageError(f"max_batch must be at least 0 (no sweep over batch sizes), not {self.max_batch}.")
        check_backend(self.backend)
        for name in ("lengths", "batch_sizes"):
            object.__setattr__(self, name, tuple(sorted(set(getattr(self, name)))))
