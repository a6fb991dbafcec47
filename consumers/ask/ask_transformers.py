"""transformers: whole prompts by calling the model, token by token by what `generate` itself does."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList
from transformers.utils import logging
from worker import serve


class Forced(LogitsProcessor):
    """Chooses the tokens it is given, and keeps the logits that the model gave before each."""

    def __init__(self, tokens: Sequence[int], now: Callable[[], float]):
        self.now = now
        self.tokens, self.seen, self.times = list(tokens), [], []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Only the next token stays possible."""
        self.times.append(self.now())
        self.seen.append(scores[0].float().numpy().copy())
        forced = torch.full_like(scores, -1e9)
        forced[:, self.tokens[len(self.seen) - 1]] = 0
        return forced


class Transformers:
    """A checkpoint in float32."""

    def __init__(self, folder: Path, threads: int):
        torch.set_num_threads(threads)
        logging.set_verbosity_error()
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.model.generation_config.eos_token_id = None  # it shall go on
        takes = inspect.signature(self.model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._prompt: list[int] = []

    @torch.inference_mode()
    def read(self, tokens: Sequence[int]) -> np.ndarray:
        """All tokens in one call."""
        self._prompt = list(tokens)
        return self.model(torch.tensor([self._prompt]), **self._last_only).logits[0, -1].numpy()

    def steps(self, tokens: Sequence[int]) -> list[np.ndarray]:
        """Generate these tokens behind the prompt."""
        return self._generate(tokens).seen[1:]

    def timed(self, tokens: Sequence[int], new: int, now: Callable[[], float]) -> dict[str, float]:
        """Prefill, and the mean step of one generation, by `now`."""
        begin = now()
        self.read(tokens)
        prefill = now() - begin
        times = self._generate(tokens[:new], now).times
        return {"prefill": prefill, "decode": (times[-1] - times[0]) / new}

    def _generate(self, tokens: Sequence[int], now: Callable[[], float] = time.perf_counter) -> Forced:
        forced, prompt = Forced([*tokens, 0], now), torch.tensor([self._prompt])
        length = {"max_new_tokens": len(tokens) + 1, "do_sample": False, "pad_token_id": 0}
        self.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), logits_processor=LogitsProcessorList([forced]), **length
        )
        return forced


if __name__ == "__main__":
    serve(Transformers, ("transformers", "torch"))
