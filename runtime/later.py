"""torch under its usual names, loaded when it is first used: `from ssmc.runtime.later import F, nn, torch`.

Loading torch takes a second or two. What describes models must not wait for it: families say which tensors they have
and what can be pruned, and only what computes with them needs torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["F", "nn", "torch"]


class _Later:
    """A module that is imported when something in it is asked for."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):  # asked by copy, pickle and inspect of whatever they meet
            raise AttributeError(name)
        module = import_module(self._name)
        if "_loaded" not in self.__dict__:  # from now on names are found without coming here
            self.__dict__ |= {key: value for key, value in vars(module).items() if not key.startswith("__")}
            self._loaded = True
        return getattr(module, name)


if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import nn
else:
    torch, nn, F = _Later("torch"), _Later("torch.nn"), _Later("torch.nn.functional")
