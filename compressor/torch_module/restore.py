"""A module as it was before it was pruned, for when something fails half-way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ssmc.compressor.torch_module.forward import Watchable


class Restorer:
    """Remembers what mixers had, and gives it back.

    Args:
        mixers: those that may be changed; only their own tensors are copied.
    """

    def __init__(self, mixers: Sequence[Watchable]):
        self._tensors: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._undo: list[Callable[[], None]] = []
        for mixer in mixers:
            tensors = [*mixer.module.parameters(), *mixer.module.buffers()]
            self._tensors += [(tensor, tensor.detach().clone()) for tensor in tensors]

    def remember(self, undo: Callable[[], None]) -> None:
        """Add a change of shape or of a configuration, by what takes it back."""
        self._undo.append(undo)

    @torch.no_grad()
    def restore(self) -> None:
        """Take everything back, the last change first."""
        while self._undo:
            self._undo.pop()()
        for tensor, before in self._tensors:
            tensor.copy_(before)


def keep_attributes(module: nn.Module, copied: nn.Module) -> None:
    """Give the parameters of a copy the attributes that its own have: `_no_weight_decay`, for one."""
    for own, other in zip(module.parameters(), copied.parameters(), strict=True):
        vars(other).update(vars(own))
