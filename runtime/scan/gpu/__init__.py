"""The selective scan on a GPU, in Triton: no compiler, no build, only the `triton` that comes with PyTorch for CUDA.

Importing this imports triton. With TRITON_INTERPRET=1 set before that, the kernels run on CPU tensors through Triton's
interpreter, thousands of times slower: that is how they are tested without a GPU.
"""

from .prefill import Plan, parts_of, plan_for, scan_states, selective_scan

__all__ = ["Plan", "parts_of", "plan_for", "scan_states", "selective_scan"]
