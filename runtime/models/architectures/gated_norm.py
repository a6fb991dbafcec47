"""A gated norm as the mathematics of Mamba-2 reads it; apart, since a module needs torch as soon as it is imported."""

from __future__ import annotations

import torch
from torch import nn


class GatedNorm(nn.Module):
    """A gated norm of another library, with transformers' name for its epsilon."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.own = norm
        self.variance_epsilon = norm.eps
        self.group_size = getattr(norm, "group_size", None) or len(norm.weight)
        self.norm_before_gate = getattr(norm, "norm_before_gate", False)

    @property
    def weight(self) -> nn.Parameter:
        """Of the norm."""
        return self.own.weight

    def forward(self, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """The norm of y (B, L, D), gated."""
        return self.own(y, gate)
