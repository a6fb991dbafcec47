"""mamba_ssm, on a GPU: its scans for whole prompts, its kernels for decoding token by token."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")  # products of float32; before triton is imported, which takes TF32

import numpy as np
import torch
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
from mamba_ssm.utils.generation import InferenceParams
from worker import serve

MOST = 4096  # tokens of a prompt and behind it


class MambaSsm:
    """A checkpoint in mamba_ssm's own layout, in float32."""

    def __init__(self, folder: Path, threads: int):
        torch.set_num_threads(threads)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        self.model = MambaLMHeadModel.from_pretrained(str(folder), device="cuda", dtype=torch.float32).eval()
        self._prompt: list[int] = []

    def read(self, tokens: Sequence[int]) -> np.ndarray:
        """All tokens in one call, without a state."""
        self._prompt = list(tokens)
        return self._logits(self._prompt)

    def steps(self, tokens: Sequence[int]) -> list[np.ndarray]:
        """Read the prompt once more, into a state, and these tokens one by one."""
        state = InferenceParams(max_seqlen=MOST, max_batch_size=1)
        self._logits(self._prompt, inference_params=state)
        rows = []
        for place, token in enumerate(tokens, len(self._prompt)):
            state.seqlen_offset = place
            rows.append(self._logits([token], inference_params=state))
        return rows

    @torch.inference_mode()
    def _logits(self, tokens: Sequence[int], **state: InferenceParams) -> np.ndarray:
        ids = torch.tensor([tokens], device="cuda")
        return self.model(ids, num_last_tokens=1, **state).logits[0, -1].cpu().numpy()


if __name__ == "__main__":
    serve(MambaSsm, ("mamba-ssm", "torch"))
