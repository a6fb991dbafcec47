"""ssmc itself, in the environment that it is installed in: to be timed beside the others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from worker import serve

from ssmc.runtime.models.generation import open_session


class Ssmc:
    """A checkpoint, with our scan."""

    def __init__(self, folder: Path, threads: int):
        torch.set_num_threads(threads)
        self.session = open_session(folder, device="cpu").session

    def read(self, tokens: Sequence[int]) -> np.ndarray:
        """All tokens in one call."""
        self.session.reset()
        return self.session.prefill(torch.tensor([list(tokens)]))[0].numpy()

    def steps(self, tokens: Sequence[int]) -> list[np.ndarray]:
        """One by one."""
        return [self.session.step(torch.tensor([token]))[0].numpy() for token in tokens]


if __name__ == "__main__":
    serve(Ssmc, ("ssmc",))
