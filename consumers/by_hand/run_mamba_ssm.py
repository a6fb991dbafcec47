"""mamba_ssm reads exports and gives the masked model's logits. Run by hand, where mamba_ssm is installed:

    python consumers/by_hand/run_mamba_ssm.py MASKED MASKED/mamba-ssm

MASKED is what `ssmc compress` wrote, MASKED/mamba-ssm what `ssmc export --format mamba-ssm` did. The whole prompt goes
through mamba_ssm's scan, the rest token by token through its kernel for decoding. It is not part of `make consumers`:
mamba_ssm is built with CUDA's compiler.

Without a GPU its Triton kernels run in Triton's interpreter, and its selective_scan_ref stands for the one kernel that
is written in CUDA, Mamba-1's prefill. An environment for that needs torch, triton, transformers and einops, and

    MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE pip install --no-deps --no-build-isolation mamba-ssm
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import nullcontext
from types import ModuleType

import torch

TOKENS, PROMPT, TOLERANCE = 48, 16, 1e-3 if torch.cuda.is_available() else 1e-4
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton


def run_on_the_cpu() -> None:
    """Let mamba_ssm be imported and run without CUDA; before it is imported."""
    import triton

    tune = triton.autotune
    triton.autotune = lambda configs, key, **others: tune(configs[:1], key, **others)  # an interpreter is not timed
    torch.cuda.device = lambda *_: nullcontext()  # which its launchers enter
    sys.modules["selective_scan_cuda"] = ModuleType("selective_scan_cuda")  # the kernel that is not there
    from mamba_ssm.modules import mamba_simple
    from mamba_ssm.ops.selective_scan_interface import selective_scan_ref

    mamba_simple.selective_scan_fn = selective_scan_ref


@torch.inference_mode()
def wanted(folder: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (1, L) and the masked model's logits (L, V) by stock transformers on the CPU, in float32."""
    sys.modules["mamba_ssm"] = None  # or transformers takes its kernels, whatever the device
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    del sys.modules["mamba_ssm"]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, model.config.vocab_size - 1, (1, TOKENS), generator=generator)
    return ids, model(ids).logits[0]


@torch.inference_mode()
def found(folder: str, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (L, V) of all tokens at once, and (L, V) with those behind PROMPT read one by one."""
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    from mamba_ssm.utils.generation import InferenceParams

    model = MambaLMHeadModel.from_pretrained(folder, device=DEVICE, dtype=torch.float32).eval()
    for module in model.modules():
        if DEVICE == "cpu" and hasattr(module, "use_mem_eff_path"):
            module.use_mem_eff_path = False  # it wants causal_conv1d, which is written in CUDA
    ids = ids.to(DEVICE)
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
    if DEVICE == "cpu":
        run_on_the_cpu()
    from mamba_ssm import __version__ as version

    worst = 0.0
    for way, logits in zip(("whole prompt", "token by token"), found(args.export, ids), strict=True):
        difference = float((logits[:, : right.shape[1]] - right[:, : logits.shape[1]]).abs().max())
        worst = max(worst, difference)
        print(f"mamba_ssm {version} on {DEVICE}, {way}: largest difference of a logit {difference:.2e}")
    print(f"allowed: {TOLERANCE:g}")
    return int(not worst <= TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
