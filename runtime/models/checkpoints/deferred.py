"""Tensors that are read, and computed, when their numbers are wanted: a model larger than memory by its names.

What torch does to a deferred tensor is noted down and gives another one, whose shape and type are known at once. So
whatever renames, joins, cuts or scales tensors works on those of a file without reading it, and whoever writes them
makes one after the other. Questions about numbers (`bool`, `item`, `equal`, `numpy`) read.

    weight = deferred(torch.empty(4, 3, device="meta"), read)
    half = weight.index_select(0, rows).to(torch.float16)    # nothing is read
    numbers = real(half)                                      # now it is
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch.utils._pytree import tree_any, tree_leaves, tree_map_only

_KNOWN = {"size", "dim", "numel", "nelement", "stride", "element_size", "is_contiguous", "is_floating_point", "__len__"}
"""Methods whose answer follows from shape and type; so do attributes."""
_ON_CPU = {"device": torch.device("cpu"), "is_meta": False, "is_cpu": True}
_MOVES = ("to", "cpu", "cuda", "type")
_COPIES = ("clone", "float")  # what these return may be written to: nobody else has its numbers


class Deferred(torch.Tensor):
    """A tensor whose numbers are not there yet. It lies on the CPU as far as others can tell; copies are written to."""

    outline: torch.Tensor  # on meta
    make: Callable[[], torch.Tensor]
    own: bool  # whether it may be written to

    def __repr__(self) -> str:
        return f"Deferred({tuple(self.outline.shape)}, {self.outline.dtype})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name == "__get__" and (attribute := func.__self__.__name__) in _ON_CPU:
            return _ON_CPU[attribute]
        if name in _KNOWN or (name == "__get__" and func.__self__.__name__ not in ("T", "mT", "H", "mH", "data")):
            return func(*_outlines(args), **_outlines(kwargs))
        if (name.endswith("_") and not name.endswith("__")) or name == "__setitem__":
            return _changed(func, args, kwargs)
        args, kwargs = _snapshot(args), _snapshot(kwargs)
        if name in _MOVES:
            return _moved(func, args, kwargs)
        try:
            outline = func(*_outlines(args), **_outlines(kwargs))
        except (NotImplementedError, RuntimeError, TypeError):  # the answer depends on the numbers
            return func(*real(args), **real(kwargs))
        if not tree_any(lambda leaf: isinstance(leaf, torch.Tensor), outline):
            return func(*real(args), **real(kwargs))
        if isinstance(outline, torch.Tensor):
            return deferred(outline, lambda: func(*real(args), **real(kwargs)), own=name in _COPIES)
        whole = _Several(lambda: tree_leaves(func(*real(args), **real(kwargs))))
        parts = [deferred(leaf, partial(whole.part, number)) for number, leaf in enumerate(tree_leaves(outline))]
        return type(outline)(parts)


def deferred(outline: torch.Tensor, make: Callable[[], torch.Tensor], own: bool = False) -> Deferred:
    """A tensor with the shape and type of `outline`, which lies on meta, whose numbers `make` returns.

    With `own`, what it returns is a new tensor each time.
    """
    with torch._C.DisableTorchFunctionSubclass():
        found = torch.Tensor._make_subclass(Deferred, outline)
    found.__dict__.update(outline=outline, make=make, own=own)
    return found


def real(value: Any) -> Any:
    """A tensor with its numbers; of a structure of tensors every one."""
    if isinstance(value, Deferred):
        return value.make()
    return tree_map_only(Deferred, lambda tensor: tensor.make(), value)


def _outlines(value: Any) -> Any:
    def outline(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.outline if isinstance(tensor, Deferred) else tensor.to("meta")

    return tree_map_only(torch.Tensor, outline, value)


def _snapshot(value: Any) -> Any:
    """Deferred tensors as they are now: what is written to them later is not in what was made of them before."""
    return tree_map_only(Deferred, lambda tensor: deferred(tensor.outline, tensor.make, tensor.own), value)


def _changed(func: Any, args: Any, kwargs: Any) -> Deferred:
    """A copy that is written to, which is put off too.

    Raises:
        TypeError: it is no copy.
    """
    target = args[0]
    if not target.own:
        raise TypeError(f"{func.__name__} writes to a tensor that is read from a file when it is wanted; clone it")
    before, rest, options = target.make, _snapshot(args[1:]), _snapshot(kwargs)

    def make() -> torch.Tensor:
        numbers = before()
        func(numbers, *real(rest), **real(options))
        return numbers

    target.__dict__["make"] = make
    return target


class _Several:
    """Several tensors that are made together, as the experts of a layer are; the last ones made stay a while."""

    _recent: ClassVar[deque[tuple[_Several, list[torch.Tensor]]]] = deque(maxlen=2)

    def __init__(self, make: Callable[[], list[torch.Tensor]]):
        self._make = make

    def part(self, number: int) -> torch.Tensor:
        made = next((tensors for whole, tensors in self._recent if whole is self), None)
        if made is None:
            made = self._make()
            self._recent.append((self, made))
        return made[number]


def _moved(func: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """Of another type; on another device than the CPU it is read, on meta its outline is all there is."""
    outline = args[0].outline
    wanted = [*args[1:], *kwargs.values()]
    devices = [torch.device(v) for v in wanted if isinstance(v, str | torch.device)]
    dtypes = [v for v in wanted if isinstance(v, torch.dtype)]
    dtypes += [v.dtype for v in wanted if isinstance(v, torch.Tensor)]
    if devices and devices[0].type == "meta":
        return outline.to(dtypes[0]) if dtypes else outline
    if func.__name__ in ("cuda", "type") or (devices and devices[0].type != "cpu"):
        return func(*real(args), **real(kwargs))
    return deferred(outline.to(dtypes[0]) if dtypes else outline, lambda: func(*real(args), **real(kwargs)))
