"""The process that holds llama.cpp: `python -m ssmc.runtime.models.llama_cpp.worker FILE CONTEXT THREADS`.

It reads one JSON object a line from stdin and answers one a line on what was stdout; llama.cpp's own words go to
stderr. Probabilities of a whole vocabulary follow their line as float32 bytes. It imports neither torch nor
transformers, so its memory is llama.cpp's.
"""

from __future__ import annotations

import json
import os
import sys
from array import array
from collections.abc import Callable
from typing import Any, BinaryIO

import psutil
import xllamacpp as llama

BIAS = 1e4  # added to the one token that shall be chosen; probabilities are those before it


class Model:
    """One file, loaded; one sequence at a time."""

    def __init__(self, path: str, context: int, threads: int):
        params = llama.CommonParams()
        params.model.path = path
        params.n_ctx, params.n_batch, params.n_ubatch = context, context, min(context, 512)
        params.n_parallel, params.fit_params, params.warmup = 1, False, False
        params.n_gpu_layers = 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        # keys and values in float32 and no fused attention: nothing is rounded that need not be
        params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = llama.Server(params)
        self._plain: int | None = None  # a token of which probabilities are told when it is chosen

    def log_probs(self, tokens: list[int], vocab_size: int, cached: bool) -> array[float]:
        """Log probabilities (V,) of what follows some tokens; `cached`: go on from what the last call read."""
        found = array("f", [float("-inf")]) * vocab_size
        for entry in self._all(tokens, cached):
            found[entry["id"]] = entry["logprob"]
        return found

    def score(self, tokens: list[int], first: int) -> tuple[list[float], list[bool]]:
        """Log probabilities of the tokens from number `first` on, and whether each was the likeliest."""
        values, likeliest = [], []
        for end in range(first, len(tokens)):
            entry = self._chosen(tokens[:end], tokens[end], 1, cached=end > first)
            if entry is None:
                entries = self._all(tokens[:end], cached=True)
                entry = next(one for one in entries if one["id"] == tokens[end]) | {"top_logprobs": entries}
            values.append(entry["logprob"])
            likeliest.append(entry["top_logprobs"][0]["id"] == tokens[end])
        return values, likeliest

    def _all(self, tokens: list[int], cached: bool) -> list[dict[str, Any]]:
        """The probabilities of all tokens, the likeliest first."""
        if self._plain is None:
            self._plain = next(token for token in range(2**20) if self._chosen(tokens, token, 1, cached) is not None)
            cached = True
        found = self._chosen(tokens, self._plain, 2**20, cached)
        return [] if found is None else found["top_logprobs"]

    def _chosen(self, tokens: list[int], token: int, count: int, cached: bool) -> dict[str, Any] | None:
        """What is told when some token is chosen, with the `count` likeliest ones.

        None for tokens of which nothing is told: those that end a text or are no whole character.
        """
        bias = [[token, BIAS]]  # which its probability does not show
        answer = self._complete(prompt=tokens, n_probs=count, logit_bias=bias, cache_prompt=cached)
        told = answer["choices"][0]["logprobs"]
        entry = told["content"][0] if told and told.get("content") else None
        if entry is not None and entry["id"] != token:
            raise RuntimeError(f"llama.cpp chose token {entry['id']} where {token} was wanted")
        return entry

    def time(self, tokens: list[int], new: int) -> dict[str, float]:
        """Seconds to read the tokens, and of one more token, by llama.cpp's own clock."""
        answer = self._complete(prompt=tokens, n_predict=new + 1, ignore_eos=True, cache_prompt=False)
        times = answer["timings"]  # of which the first new token belongs to reading
        return {"read": times["prompt_ms"] / 1e3, "token": times["predicted_ms"] / 1e3 / max(new, 1)}

    def tokenize(self, text: str) -> int:
        """How many tokens llama.cpp's own tokenizer makes of a text."""
        return self._complete(prompt=text, cache_prompt=False)["usage"]["prompt_tokens"]

    def continued(self, text: str, new: int) -> str:
        """Greedy continuation of a text, by llama.cpp's own tokenizer."""
        return self._complete(prompt=text, n_predict=new, cache_prompt=False)["choices"][0]["text"]

    def _complete(self, **request: Any) -> dict[str, Any]:
        answer = self._server.handle_completions({"n_predict": 1, "temperature": 0, **request})
        if "error" in answer or "choices" not in answer:
            raise RuntimeError(str((answer.get("error") or answer).get("message", "no answer"))[:300])
        return answer


def serve(model: Model, out: BinaryIO) -> None:
    """Answer requests until there are no more."""
    calls: dict[str, Callable[..., Any]] = {
        "log_probs": model.log_probs,
        "score": model.score,
        "time": model.time,
        "tokenize": model.tokenize,
        "continued": model.continued,
        "memory": _memory,
    }
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer, data = calls[request.pop("call")](**request), b""
            if isinstance(answer, array):
                data = answer.tobytes()
                answer = len(answer)
            reply = {"answer": answer, "bytes": len(data)}
        except (RuntimeError, ValueError, KeyError) as error:
            reply, data = {"error": str(error) or type(error).__name__, "bytes": 0}, b""
        out.write(json.dumps(reply).encode() + b"\n" + data)
        out.flush()


def _memory() -> dict[str, int]:
    """Resident bytes of this process."""
    return {"resident": psutil.Process().memory_info().rss}


def main() -> None:
    """Load the file and serve."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # llama.cpp prints
    before = _memory()["resident"]
    path, context, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    model = Model(path, context, threads)
    out.write(json.dumps({"answer": {"before": before, **_memory()}, "bytes": 0}).encode() + b"\n")
    out.flush()
    serve(model, out)


if __name__ == "__main__":
    main()
