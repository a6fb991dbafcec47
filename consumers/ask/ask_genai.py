"""onnxruntime-genai runs a folder with a genai_config.json; it keeps the states itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime_genai as genai
from worker import serve

ROOM = 4096  # tokens at most


class Genai:
    """A folder."""

    def __init__(self, folder: Path, threads: int):
        config = genai.Config(str(folder))
        options = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": options}}))
        self.model = genai.Model(config)
        self._generator = self._fresh()

    def read(self, tokens: Sequence[int]) -> np.ndarray:
        """All tokens in one call."""
        self._generator = self._fresh()
        return self._append(tokens)

    def steps(self, tokens: Sequence[int]) -> list[np.ndarray]:
        """One by one."""
        return [self._append([token]) for token in tokens]

    def _fresh(self) -> genai.Generator:
        params = genai.GeneratorParams(self.model)
        params.set_search_options(max_length=ROOM, batch_size=1, do_sample=False)
        return genai.Generator(self.model, params)

    def _append(self, tokens: Sequence[int]) -> np.ndarray:
        self._generator.append_tokens(np.array(tokens, np.int32))
        logits = self._generator.get_logits()
        return np.array(logits, np.float32).reshape(-1, logits.shape[-1])[-1]


if __name__ == "__main__":
    serve(Genai, ("onnxruntime-genai", "onnxruntime"))
