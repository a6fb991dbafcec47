"""OpenVINO on a CPU reads the ONNX graph as it is: the states are inputs and outputs.

Keys and values of attention are empty at first, along the axis without a length.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import openvino
from worker import serve


class Compiled:
    """model.onnx of a folder, computed in float32."""

    def __init__(self, folder: Path, threads: int):
        settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        self.model = openvino.Core().compile_model(folder / "model.onnx", "CPU", settings)
        named = {port.get_any_name(): port for port in self.model.inputs}
        pasts = {name: port.get_partial_shape() for name, port in named.items() if name.startswith("past_")}
        self.pasts = {name: [max(0, axis.get_min_length()) for axis in list(s)[1:]] for name, s in pasts.items()}
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
        found = self.model({"input_ids": ids, "attention_mask": np.ones_like(ids), **self._states})
        self._states = {name: found[name.replace("past_", "present_", 1)].copy() for name in self.pasts}
        return found["logits"][0, -1].copy()


if __name__ == "__main__":
    serve(Compiled, ("openvino",))
