"""mlx-lm on a CPU, in float32, without the compiler that its CPU build wants for fused kernels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

os.environ["MLX_DISABLE_COMPILE"] = "1"

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
from worker import serve


class Mlx:
    """A checkpoint; the number of threads is MLX's own affair."""

    def __init__(self, folder: Path, threads: int):
        self.model, _ = load_model(folder)
        self.model.set_dtype(mx.float32)
        self._cache = make_prompt_cache(self.model)

    def read(self, tokens: Sequence[int]) -> np.ndarray:
        """All tokens in one call."""
        self._cache = make_prompt_cache(self.model)
        return self._call(tokens)

    def steps(self, tokens: Sequence[int]) -> list[np.ndarray]:
        """One by one from its cache."""
        return [self._call([token]) for token in tokens]

    def _call(self, tokens: Sequence[int]) -> np.ndarray:
        return np.array(self.model(mx.array([list(tokens)]), cache=self._cache)[0, -1].astype(mx.float32))


if __name__ == "__main__":
    serve(Mlx, ("mlx-lm", "mlx"))
