"""Which parameters take gradient steps, and which of their entries stay as they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def only_these_move(moving: Iterable[nn.Parameter], *modules: nn.Module) -> Iterator[None]:
    """Inside the block, of all parameters of `modules` those in `moving` have gradients; after it all is as before.

    Args:
        moving: parameters of these modules.
        modules: whatever computes anything inside the block.
    """
    flags = {p: p.requires_grad for module in modules for p in module.parameters()}
    try:
        for parameter in flags:
            parameter.requires_grad_(False)
        for parameter in moving:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.grad = None
            parameter.requires_grad_(flag)


def hold(gradients: Sequence[torch.Tensor], pinned: Sequence[torch.Tensor | None]) -> None:
    """Set the gradients of entries that must not move to zero, in place.

    Args:
        gradients: one for each parameter.
        pinned: which entries of each stay as they are, of the same shape; None: none.
    """
    for gradient, entries in zip(gradients, pinned, strict=True):
        if entries is not None:
            gradient.masked_fill_(entries, 0)
