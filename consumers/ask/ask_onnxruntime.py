"""onnxruntime on a CPU, with nothing but numpy beside it: the states are inputs and outputs.

Keys and values of attention are empty at first, along the axis that has a name.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from worker import serve


class Graph:
    """model.onnx of a folder."""

    def __init__(self, folder: Path, threads: int):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.force_spinning_stop", "1")  # else it disturbs who is timed next
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        pasts = (port for port in self.session.get_inputs() if port.name.startswith("past_"))
        self.pasts = {port.name: [0 if isinstance(n, str) else n for n in port.shape[1:]] for port in pasts}
        self._states: dict[str, np.ndarray] = {}

    def read(self, tokens: Sequence[int]) -> np.ndarray:
        """All tokens in one call."""
        self._states = {name: np.zeros((1, *shape), np.float32) for name, shape in self.pasts.items()}
        return self._run(tokens)

    def steps(self, tokens: Sequence[int]) -> list[np.ndarray]:
        """One by one, each from the states that the last one left."""
        return [self._run([token]) for token in tokens]

    def _run(self, tokens: Sequence[int]) -> np.ndarray:
        ids = np.array([list(tokens)], np.int64)
        presents = [name.replace("past_", "present_", 1) for name in self.pasts]
        feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), **self._states}
        logits, *states = self.session.run(["logits", *presents], feed)
        self._states = dict(zip(self.pasts, states, strict=True))
        return logits[0, -1]


if __name__ == "__main__":
    serve(Graph, ("onnxruntime",))
