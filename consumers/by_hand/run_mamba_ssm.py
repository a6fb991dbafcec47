"""mamba_ssm reads an export and gives the masked model's logits. Run by hand, on a machine with a GPU and mamba_ssm:

    python consumers/by_hand/run_mamba_ssm.py MASKED MASKED/mamba-ssm

MASKED is what `ssmc compress` wrote, MASKED/mamba-ssm what `ssmc export --format mamba-ssm` did. The whole prompt goes
through mamba_ssm's scan, the rest token by token through its kernel for decoding. It is not part of `make consumers`:
mamba_ssm is built with CUDA's compiler.
"""

from __future__ import annotations

import argparse
import sys

import torch
from mamba_ssm import __version__ as version
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
from mamba_ssm.utils.generation import InferenceParams
from transformers import AutoModelForCausalLM

TOKENS, PROMPT, TOLERANCE = 48, 16, 1e-3


@torch.inference_mode()
def wanted(folder: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (1, L) and the masked model's logits (L, V) by stock transformers on the CPU, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, model.config.vocab_size - 1, (1, TOKENS), generator=generator)
    return ids, model(ids).logits[0]


@torch.inference_mode()
def found(folder: str, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (L, V) of all tokens at once, and (L, V) with those behind PROMPT read one by one."""
    model = MambaLMHeadModel.from_pretrained(folder, device="cuda", dtype=torch.float32).eval()
    ids = ids.to("cuda")
    whole = model(ids).logits[0]
    state = InferenceParams(max_seqlen=TOKENS, max_batch_size=1)
    rows = [model(ids[:, :PROMPT], inference_params=state).logits[0]]
    for place in range(PROMPT, TOKENS):
        state.seqlen_offset = place
        rows.append(model(ids[:, place : place + 1], inference_params=state).logits[0])
    return whole.cpu(), torch.cat(rows).cpu()


def main() -> int:
    """1 if mamba_ssm computes something else."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("masked")
    parser.add_argument("export")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    ids, right = wanted(args.masked)
    worst = 0.0
    for way, logits in zip(("whole prompt", "token by token"), found(args.export, ids), strict=True):
        difference = float((logits[:, : right.shape[1]] - right[:, : logits.shape[1]]).abs().max())
        worst = max(worst, difference)
        print(f"mamba_ssm {version}, {way}: largest difference of a logit {difference:.2e}, allowed {TOLERANCE:g}")
    return int(not worst <= TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
