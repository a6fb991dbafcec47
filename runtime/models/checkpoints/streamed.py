"""A model whose weights stay in their files: each of its parts has them in memory while it is used, and not longer.

A part is a block, or a module beside the blocks that holds tensors itself: embedding, last norm, head. Whoever runs the
model, or a part of it, need not know; whoever looks at a part without running it holds it.

    with streamed.holding(block):
        block.mixer.A_log     # is there now
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn

from ssmc.runtime.models.checkpoints.deferred import Deferred, real

KEPT = 256 << 20  # bytes of parts that stay in memory after their use: small models are read once
KERNELS = 200 << 20  # bytes that compiled kernels and threads take once work begins
COPIES = 3  # of the largest part in float32: itself, as it is stored, and what is computed with it


@dataclass
class _Part:
    """What one part needs, and how many use it now."""

    module: nn.Module
    tensors: list[tuple[dict[str, Any], str, Any]]  # of a submodule: where it keeps them, name, tensor
    users: int = 0
    there: bool = False

    @property
    def nbytes(self) -> int:
        """In float32."""
        return sum(4 * tensor.numel() for _, _, tensor in self.tensors)


class Streamed:
    """Gives a model on meta its weights, part by part, in float32.

    Args:
        model: changed in place: running a part of it reads its weights first.
        blocks: of the model.
        tensors: deferred, by the model's names, without those that are tied to another one.
        kept: bytes of parts that may stay in memory between two uses.
    """

    def __init__(
        self, model: nn.Module, blocks: Iterable[nn.Module], tensors: Mapping[str, torch.Tensor], kept: int = KEPT
    ):
        self.tensors, self.kept = tensors, kept
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        named = {id(module): name for name, module in model.named_modules()}
        self._parts: dict[int, _Part] = {}
        inside: set[int] = set()
        for block in blocks:
            self._add(block, block.modules(), named, tied)
            inside.update(map(id, block.modules()))
        for module in model.modules():
            if id(module) not in inside:
                self._add(module, [module], named, tied)
        self._hooks = [hook for part in self._parts.values() for hook in self._hooked(part.module)]

    def _add(
        self, owner: nn.Module, modules: Iterable[nn.Module], named: Mapping[int, str], tied: Mapping[str, str]
    ) -> None:
        found = []
        for module in modules:
            for place in (module._parameters, module._buffers):
                for name, tensor in place.items():
                    if tensor is not None and tensor.is_meta:
                        full = f"{named[id(module)]}.{name}".removeprefix(".")
                        found.append((place, name, self.tensors[tied.get(full, full)]))
        if found:
            self._parts[id(owner)] = _Part(owner, found)

    def _hooked(self, module: nn.Module) -> Iterator[Any]:
        # functions, not methods: copies of a block share them, and are no parts themselves
        yield module.register_forward_pre_hook(lambda module, _: self._enter(module), prepend=True)
        yield module.register_forward_hook(lambda module, _, out: self._leave(module), always_call=True)

    @contextlib.contextmanager
    def holding(self, module: nn.Module, keep: bool = True) -> Iterator[nn.Module]:
        """A part has its weights inside the block. Unless `keep`, it loses them after it, and what was made of them."""
        self._enter(module)
        try:
            yield module
        finally:
            self._leave(module)
            if not keep:
                self._drop(self._parts[id(module)])

    def read(self) -> None:
        """Have all parts in memory for good; the model is an ordinary one afterwards."""
        for hook in self._hooks:
            hook.remove()
        for part in self._parts.values():
            _fill(part)

    def nbytes(self) -> int:
        """Of the largest part, in float32."""
        return max(part.nbytes for part in self._parts.values())

    def _enter(self, module: nn.Module) -> None:
        if (part := self._parts.get(id(module))) is None or part.module is not module:
            return
        part.users += 1
        if not part.there:
            self._make_room(part)
            _fill(part)

    def _leave(self, module: nn.Module) -> None:
        if (part := self._parts.get(id(module))) is None or part.module is not module:
            return
        part.users -= 1
        if part.users == 0 and part.nbytes > self.kept:
            self._drop(part)

    def _make_room(self, coming: _Part) -> None:
        """Drop those that are not used, until it all fits."""
        idle = [part for part in self._parts.values() if part.there and part.users == 0]
        over = sum(part.nbytes for part in idle) + coming.nbytes - self.kept
        for part in idle:
            if over <= 0:
                return
            self._drop(part)
            over -= part.nbytes

    def _drop(self, part: _Part) -> None:
        for place, name, tensor in part.tensors:
            _put(place, name, torch.empty(tensor.shape, device="meta"))
        part.there = False


def _fill(part: _Part) -> None:
    if part.there:
        return
    for place, name, tensor in part.tensors:
        copy = not isinstance(tensor, Deferred)  # of a file that had to be read whole
        _put(place, name, real(tensor).to(torch.float32, copy=copy))
    part.there = True


def _put(place: dict[str, Any], name: str, tensor: torch.Tensor) -> None:
    old = place[name]
    if isinstance(old, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=old.requires_grad)
    place[name] = tensor


def least_resident(streamed: Streamed | None) -> int:
    """Bytes that a process will have resident at least, asked before its work begins.

    What python, torch and compiled kernels take no formula knows; the system is asked.

    Args:
        streamed: gives the model its weights; None: the caller counts what the weights take.
    """
    begun = psutil.Process().memory_info().rss + KERNELS
    return begun if streamed is None else begun + COPIES * streamed.nbytes()
