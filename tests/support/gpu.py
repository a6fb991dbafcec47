"""Tests that need a GPU, or run kernels on one where there is one.

`make test` runs what is marked `gpu` alone and in one process, and everything else as on a machine without a GPU.
"""

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()

if HAS_CUDA:
    # torch rounds the inputs of float32 convolutions to 10 bits on a GPU unless told otherwise
    torch.backends.cudnn.allow_tf32 = False


def needs_cuda(test):
    """Skip a test where there is no CUDA GPU."""
    return pytest.mark.gpu(pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA GPU")(test))


def bytes_above(call):
    """Memory of the GPU that a call takes at most, beyond what is there already."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
