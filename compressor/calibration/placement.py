"""Where things are while a model is pruned: on a GPU one layer and what it reads, on the host everything else.

A GPU's memory then limits the size of a layer, not of a model. Copies go through pinned memory on a stream of their
own: while a layer is worked on, the next one comes and the one before goes home. On a CPU nothing is copied at all.
What layers read may be kept in half precision; it is computed with in float32.

    stage = Stage(device)
    hidden = stage.place(hidden)
    for index, block in stage.each(blocks):          # block is on the device now
        for i, sample in samples(hidden, stage.device):
            put(hidden, i, block(sample))
        settle(hidden, stage.device)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import nn

from ssmc.compressor.calibration.on_disk import on_disk, release
from ssmc.runtime.errors import CalibrationError
from ssmc.runtime.models.checkpoints.streamed import Streamed
from ssmc.runtime.progress import NO_PROGRESS, Progress

HIDDEN_SHARE = 0.25
"""Part of a GPU's free memory that the inputs of a layer may take; some passes keep a second copy of them, and the work
on a layer needs the rest."""


@dataclass(frozen=True)
class _Copy:
    """A tensor that may still be on its way."""

    tensor: torch.Tensor
    done: torch.cuda.Event | None  # None: it is there


class Stage:
    """Brings modules to a device for as long as they are worked on, and what became of them back to their own memory.

    Args:
        device: where the work is done.
        copies: whether modules are copied there and back; by default if the device is no CPU. Copies from CPU memory to
            CPU memory show on any machine that everything is where it should be.
        streamed: gives modules the weights that lie in files; None where they are in memory. What became of a module
            after its turn is gone.
        spill: folder for hidden states; None: they are in memory.
    """

    def __init__(
        self,
        device: torch.device,
        copies: bool | None = None,
        streamed: Streamed | None = None,
        spill: Path | None = None,
    ):
        self.device, self.streamed, self.spill = device, streamed, spill
        self.copies = device.type != "cpu" if copies is None else copies
        self._coming: dict[nn.Module, list[_Copy]] = {}
        self._leaving: list[tuple[torch.Tensor, _Copy]] = []  # home, and what is on its way there

    def gather(self, pieces: Sequence[Callable[[], torch.Tensor]], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The inputs of a layer, (nsamples, L, d_model), where they stay, from functions that make a sample each.

        Raises:
            CalibrationError: a number is too large for `dtype`.
        """
        first = pieces[0]()
        shape = (len(pieces), *first.shape)
        hidden = torch.empty(shape, dtype=dtype) if self.spill is None else on_disk(shape, self.spill, dtype)
        for i, make in enumerate(pieces):
            put(hidden, i, (make() if i else first)[None])
            release(hidden[i])
        return self.place(hidden)

    def copied(self, hidden: torch.Tensor) -> torch.Tensor:
        """Another tensor with the same inputs of a layer, where they stay."""
        if self.spill is None:
            return self.place(hidden.clone())
        return self.gather([partial(torch.Tensor.detach, sample) for sample in hidden], hidden.dtype)

    def place(self, hidden: torch.Tensor) -> torch.Tensor:
        """The inputs of a layer, (nsamples, L, d_model), where they stay: on the device if they fit, else pinned."""
        if self.device.type == "cpu" or not hidden.is_cpu or self.spill is not None:
            return hidden
        if hidden.nbytes <= HIDDEN_SHARE * torch.cuda.mem_get_info(self.device)[0]:
            return hidden.to(self.device)
        return hidden.pin_memory()

    def each(self, modules: Sequence[nn.Module]) -> Iterator[tuple[int, nn.Module]]:
        """Number and module, one after the other, each on the device during its turn; the next is on its way then."""
        try:
            for index, module in enumerate(modules):
                with self.holding(module, modules[index + 1] if index + 1 < len(modules) else None):
                    yield index, module
        finally:
            self._coming.clear()  # of a loop that was left early
            self.finish()

    @contextlib.contextmanager
    def holding(self, module: nn.Module, following: nn.Module | None = None) -> Iterator[nn.Module]:
        """`module` is on the device inside the block and starts for home after it.

        Its tensors at home have their new values when the next module left, or `finish` was called.
        """
        if self.streamed is not None:
            with self.streamed.holding(module, keep=False):
                yield module.to(self.device) if self.copies else module
            return
        if not self.copies:
            yield module
            return
        fetched = self._coming.pop(module, None) or _fetch(module, self.device)
        homes = {}
        for tensor, copy in zip(_tensors(module), fetched, strict=True):
            homes[tensor], tensor.data = tensor.data, _arrived(copy, self.device)
        if following is not None:
            self._coming[following] = _fetch(following, self.device)
        try:
            yield module
        finally:
            self.finish()  # what left before: its copies had a whole layer's time
            for tensor in _tensors(module):
                self._send(tensor, homes.get(tensor))

    def finish(self) -> None:
        """Have everything that left the device at home."""
        for home, copy in self._leaving:
            if copy.done is not None:
                copy.done.synchronize()
            home.copy_(copy.tensor)
        self._leaving = []

    def _send(self, tensor: torch.Tensor, home: torch.Tensor | None) -> None:
        """Start the copy of a tensor to the memory it had before, or to new one if it is another tensor now."""
        away = tensor.data
        if home is None or home.shape != away.shape or home.dtype != away.dtype:
            tensor.data = away.to("cpu", copy=True)
            return
        self._leaving.append((home, _to_host(away, self.device)))
        tensor.data = home


HOST = Stage(torch.device("cpu"))
"""Everything stays where it is."""


def samples(
    hidden: torch.Tensor, device: torch.device, copies: bool | None = None
) -> Iterator[tuple[int, torch.Tensor]]:
    """The samples (1, L, d_model) of `hidden` one after the other on a device; see `ahead`."""
    for i, sample in enumerate(ahead(hidden.split(1), device, copies)):
        yield i, sample
        release(hidden[i])


def ahead(pieces: Iterable[torch.Tensor], device: torch.device, copies: bool | None = None) -> Iterator[torch.Tensor]:
    """Pieces of host memory on a device, each copied while the one before it is worked on.

    Pieces that are there already are handed on as they are; those in half precision become float32.

    Args:
        pieces: tensors.
        device: where they go.
        copies: copy even from a device to itself; by default only from one to another.
    """
    coming: _Copy | None = None
    for piece in pieces:
        if not (piece.device.type != device.type if copies is None else copies):
            yield computing(piece)
            continue
        following = _to_device(piece, device)
        if coming is not None:
            yield computing(_arrived(coming, device))
        coming = following
    if coming is not None:
        yield computing(_arrived(coming, device))


def put(hidden: torch.Tensor, index: int, value: torch.Tensor) -> None:
    """Replace sample `index` of `hidden` by `value` (1, L, d_model); `settle` waits for the last of them.

    Raises:
        CalibrationError: a number is too large for float16, where that is what `hidden` is in.
    """
    if hidden.dtype == torch.float16 and bool((value.abs() > torch.finfo(torch.float16).max).any()):
        raise CalibrationError(
            "Hidden states of this model are too large for float16. Use --hidden-dtype bfloat16, which has the range "
            "of float32."
        )
    hidden[index : index + 1].copy_(value, non_blocking=True)


def computing(x: torch.Tensor) -> torch.Tensor:
    """`x` in the type to compute with: float64 stays, everything narrower becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def copy_samples(target: torch.Tensor, source: torch.Tensor) -> None:
    """Overwrite the samples of `target` by those of `source`, both (nsamples, L, d_model)."""
    for to, sample in zip(target, source, strict=True):
        to.copy_(sample)
        release(to)
        release(sample)


def settle(hidden: torch.Tensor, device: torch.device) -> None:
    """Wait until everything that was `put` into host memory is there."""
    if device.type == "cuda" and hidden.is_cpu:
        torch.cuda.current_stream(device).synchronize()


def propagate(
    block: nn.Module,
    hidden: torch.Tensor,
    progress: Progress = NO_PROGRESS,
    label: str = "outputs",
    run: Callable[[nn.Module, torch.Tensor], torch.Tensor] = nn.Module.__call__,
) -> None:
    """Replace every sample of `hidden` (nsamples, L, d_model) by what `block` computes from it, run by `run`."""
    device = device_of(block)
    for i, sample in samples(hidden, device):
        progress(label, i, len(hidden))
        put(hidden, i, run(block, sample))
    settle(hidden, device)
    progress(label, len(hidden), len(hidden))


def device_of(module: nn.Module) -> torch.device:
    """Where a module is."""
    return next(module.parameters()).device


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    """The parameters and buffers of a module, each once."""
    return list(dict.fromkeys([*module.parameters(), *module.buffers()]))


def _fetch(module: nn.Module, device: torch.device) -> list[_Copy]:
    """Start to copy the tensors of a module to a device."""
    return [_to_device(tensor.data, device) for tensor in _tensors(module)]


def _to_device(tensor: torch.Tensor, device: torch.device) -> _Copy:
    """Start to copy a tensor of the host; `_arrived` waits for it."""
    if device.type != "cuda":
        return _Copy(tensor.to(device, copy=True), None)
    pinned = tensor if tensor.is_pinned() else tensor.pin_memory()  # torch keeps it until its copy is done
    with torch.cuda.stream(_copy_stream(device)):
        return _Copy(pinned.to(device, non_blocking=True), _copy_stream(device).record_event())


def _arrived(copy: _Copy, device: torch.device) -> torch.Tensor:
    """The tensor, with the work that follows waiting for it."""
    if copy.done is not None:
        current = torch.cuda.current_stream(device)
        current.wait_event(copy.done)
        copy.tensor.record_stream(current)  # its memory was allocated for the other stream
    return copy.tensor


def _to_host(tensor: torch.Tensor, device: torch.device) -> _Copy:
    """Start to copy a tensor of the device to pinned memory, after the work on it."""
    if device.type != "cuda":
        return _Copy(tensor.clone(), None)
    stream = _copy_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    tensor.record_stream(stream)
    return _Copy(host, stream.record_event())


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which everything is copied to and from a device."""
    return torch.cuda.Stream(device)
