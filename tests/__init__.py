import os

import torch

if not torch.cuda.is_available():
    # Before anything imports triton (transformers does): without a GPU, its kernels run through its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")
