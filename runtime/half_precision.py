"""Linear maps in bfloat16 where the hardware has instructions for it: for gradient steps, and to compare candidates.

Weights, the residual stream, norms, convolutions, scans, the softmax and the loss stay in float32. A product rounds
what it reads and what it gives, and is summed up in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


def is_fast(device: torch.device) -> bool:
    """Whether this device multiplies bfloat16 faster than float32: AVX512-BF16 or AMX of a CPU, any GPU that has it.

    Asked of the hardware and never timed, so that one machine always computes the same bytes.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):  # of older releases of torch
        return False
    has = torch.cpu.get_capabilities()
    return any(has.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def half_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Inside the block linear maps of float32, and their gradients, are computed in bfloat16 where that is fast."""
    return _LinearInBfloat16() if is_fast(device) else nullcontext()


class _LinearInBfloat16(TorchFunctionMode):
    """Replaces `F.linear`, which the linear maps of all models end in."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.linear and not kwargs and all(t is None or t.dtype == torch.float32 for t in args):
            return _Linear.apply(*args, *[None] * (3 - len(args)))
        return func(*args, **(kwargs or {}))


class _Linear(torch.autograd.Function):
    """y = x W' + b, whose gradients are products in bfloat16, too."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """(..., in), (out, in) and (out,) to (..., out), all in float32."""
        read, short = x.bfloat16(), weight.bfloat16()
        ctx.save_for_backward(read, short)
        y = F.linear(read, short).float()  # no view, as callers write into it
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """(..., out) to the gradients of x, weight and bias."""
        read, short = ctx.saved_tensors
        of_y, wants = gradients[0], ctx.needs_input_grad
        halved = of_y.bfloat16()
        return (
            (halved @ short).float() if wants[0] else None,
            (halved.flatten(0, -2).T @ read.flatten(0, -2)).float() if wants[1] else None,
            of_y.flatten(0, -2).sum(0) if wants[2] else None,
        )
