"""vLLM reads an export and gives the masked model's log probabilities. Run by hand, in an environment that has vLLM:

    python consumers/by_hand/run_vllm.py logits MASKED wanted.npz        # where ssmc is, on what `ssmc compress` wrote
    python consumers/by_hand/run_vllm.py compare MASKED/safetensors wanted.npz     # where vLLM is

It is not part of `make consumers`: vLLM takes gigabytes, and its kernel for Mamba-1 needs a GPU. vLLM tells the
likeliest TOP log probabilities of every token of a prompt, which are compared; the smallest difference of the ways to
write a text token by token is not, since vLLM chooses the tokens.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np

TOKENS, TOP, TOLERANCE = 48, 20, 1e-3  # kernels on a GPU sum in another order, with TF32 switched off


def write_logits(folder: str, path: str) -> None:
    """Log probabilities (L, V) of the masked model by stock transformers, with its (L,) tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, model.config.vocab_size - 1, (1, TOKENS), generator=generator)
    with torch.inference_mode():
        found = model(ids).logits[0].log_softmax(-1)
    np.savez(path, tokens=ids[0].numpy(), wanted=found.numpy())


def compare(folder: str, path: str) -> float:
    """Largest difference of vLLM's TOP log probabilities of every token of the prompt but the first."""
    from vllm import LLM, SamplingParams

    with np.load(path) as file:
        tokens, wanted = file["tokens"].tolist(), file["wanted"]
    llm = LLM(model=folder, dtype="float32", enforce_eager=True, max_logprobs=TOP, max_model_len=512)
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=TOP)
    told = llm.generate({"prompt_token_ids": tokens}, sampling)[0].prompt_logprobs
    pairs = [(entry.logprob, wanted[i, token]) for i, found in enumerate(told[1:]) for token, entry in found.items()]
    return max(abs(got - right) for got, right in pairs)


def main() -> int:
    """1 if vLLM computes something else."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("logits", "compare"))
    parser.add_argument("folder")
    parser.add_argument("path", help="of the file between the two steps")
    args = parser.parse_args()
    if args.step == "logits":
        write_logits(args.folder, args.path)
        return 0
    import vllm

    worst = compare(args.folder, args.path)
    print(f"vLLM {vllm.__version__}: largest difference of a log probability {worst:.2e}, allowed {TOLERANCE:g}")
    return int(not worst <= TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
