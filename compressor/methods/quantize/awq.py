"""Activation-aware rounding after AWQ (Lin et al. 2023, arXiv 2306.00978): inputs that matter are scaled up first.

W x = (W S) (S^-1 x): the columns of W that read large inputs are multiplied by s_j > 1, so that rounding costs them
less, and what makes the inputs is divided by it. s_j = rms(x_j)^a, with a between 0 and 1 by search. The division has
to be written into something: it can where a norm with a weight stands right before the map. That is in_proj in models
with one kind of block, and out_proj behind the gated norm of a Mamba-2. Elsewhere only the range of each group is
searched, with the inputs weighted by their second moments.
"""

from __future__ import annotations

import torch
from torch import nn

from ssmc.compressor.calibration.placement import computing
from ssmc.compressor.methods.method import Job
from ssmc.compressor.methods.quantize.grid import DIGITS, fit_grid, spanning_grid
from ssmc.compressor.methods.weights.second_moments import check_finite
from ssmc.compressor.methods.weights.sparsegpt import relative_error
from ssmc.runtime.quantized import GridShape, Quantized

EXPONENTS = tuple(step / 20 for step in range(21))


def awq(weight: torch.Tensor, hessian: torch.Tensor, shape: GridShape, digits: int = DIGITS) -> Quantized:
    """The nearest codes in ranges that were searched with weighted inputs; arguments as for `gptq`."""
    before = computing(weight.detach())
    return fit_grid(before, shape, check_finite(hessian).diagonal().to(before), digits).quantized(before)


def best_scales(weight: torch.Tensor, hessian: torch.Tensor, shape: GridShape, digits: int) -> torch.Tensor:
    """The factors s (in,) of the columns of a weight (out, in) whose rounding costs the output least."""
    rms = hessian.diagonal().clamp(min=0).sqrt().to(torch.float32)
    rms = rms.clamp(min=float(rms.max()) * 1e-4 or 1.0)  # an input that says nothing stays as it is, more or less
    before, best, least = computing(weight), torch.ones_like(rms), float("inf")
    for exponent in EXPONENTS:
        scales = rms.pow(exponent)
        scales = scales / (scales.max() * scales.min()).sqrt()
        scaled = before * scales
        found = spanning_grid(scaled, shape, digits).quantized(scaled).weight()
        error = relative_error(before, found.to(before) / scales, hessian)
        if error < least:
            best, least = scales, error
    return best


def norm_before(job: Job, name: str) -> nn.Parameter | None:
    """The weight of the norm whose output a projection alone reads; None where there is none."""
    if name == "in_proj" and job.architecture.capabilities.uniform:
        return getattr(getattr(job.work, "norm", None), "weight", None)
    if name == "out_proj" and job.plan.has_heads:
        return getattr(getattr(job.mixer, "norm", None), "weight", None)
    return None


def scale_inputs(
    job: Job, name: str, weight: torch.Tensor, hessian: torch.Tensor, shape: GridShape, digits: int
) -> torch.Tensor:
    """Scale the columns of the `weight` (out, in) of a projection in place where a norm can undo it.

    Returns:
        The second moments of what it reads now, (in, in).
    """
    norm = norm_before(job, name)
    if norm is None or norm.shape != weight.shape[1:]:
        return hessian
    scales = best_scales(weight, hessian, shape, digits)
    weight.mul_(scales)
    norm.data.div_(scales)
    return hessian / (scales[:, None] * scales).double()
