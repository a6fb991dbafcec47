"""llama.cpp through the server in xllamacpp: log probabilities of the whole vocabulary, and its own clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xllamacpp
from worker import serve

ROOM = 2048  # tokens of a sequence at most
CHOSEN = 1e4  # bias of the token that shall be chosen; probabilities are those before it


class LlamaCpp:
    """model.gguf of a folder, on a CPU."""

    def __init__(self, folder: Path, threads: int):
        params = xllamacpp.CommonParams()
        params.model.path = str(folder / "model.gguf")
        params.n_ctx, params.n_batch, params.n_ubatch = ROOM, ROOM, 512
        params.n_parallel, params.fit_params, params.warmup, params.n_gpu_layers = 1, False, False, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # keys and values of hybrids
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(params)
        self._prompt: list[int] = []
        self._plain: int | None = None

    def read(self, tokens: Sequence[int]) -> np.ndarray:
        """All tokens in one request."""
        self._prompt = list(tokens)
        return self._log_probs(cached=False)

    def steps(self, tokens: Sequence[int]) -> list[np.ndarray]:
        """One by one: every request repeats the text, of which the server computes what is new."""
        found = []
        for token in tokens:
            self._prompt.append(token)
            found.append(self._log_probs(cached=True))
        return found

    def timed(self, tokens: Sequence[int], new: int, now: Callable[[], float]) -> dict[str, float]:
        """Seconds of a prefill and of a step: on the clock by llama.cpp's own, else by `now` around requests."""
        if now is time.perf_counter:  # of which the first new token is the prefill's
            answer = self._ask(prompt=list(tokens), n_predict=new + 1, ignore_eos=True, cache_prompt=False)["timings"]
            return {"prefill": answer["prompt_ms"] / 1e3, "decode": answer["predicted_ms"] / 1e3 / new}
        begin = now()
        self._ask(prompt=list(tokens), n_predict=1, cache_prompt=False)
        prefill, begin = now() - begin, now()
        self._ask(prompt=list(tokens[:1]), n_predict=new, ignore_eos=True, cache_prompt=False)
        return {"prefill": prefill, "decode": (now() - begin) / new}

    def _log_probs(self, cached: bool) -> np.ndarray:
        """Of what follows the prompt. Nothing is told of a token that ends texts, so one that does not is chosen."""
        if self._plain is None:
            self._plain = next(token for token in range(2**20) if self._told(token, 1, cached) is not None)
        entries = self._told(self._plain, 2**20, cached)["top_logprobs"]
        found = np.empty(len(entries), np.float32)
        found[[entry["id"] for entry in entries]] = [entry["logprob"] for entry in entries]
        return found

    def _told(self, token: int, count: int, cached: bool) -> dict[str, Any] | None:
        answer = self._ask(
            prompt=self._prompt, n_predict=1, n_probs=count, logit_bias=[[token, CHOSEN]], cache_prompt=cached
        )
        told = answer["choices"][0]["logprobs"]
        return told["content"][0] if told and told.get("content") else None

    def _ask(self, **request: Any) -> dict[str, Any]:
        answer = self.server.handle_completions({"temperature": 0, **request})
        if "choices" not in answer:
            raise RuntimeError(str((answer.get("error") or answer).get("message", "no answer"))[:300])
        return answer


if __name__ == "__main__":
    serve(LlamaCpp, ("xllamacpp",), "log probabilities")
