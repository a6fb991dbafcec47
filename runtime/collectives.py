"""Several processes at one piece of work: who does what, and sums that are the same in all of them, to the last bit.

Sums are added up in the order of the ranks, so all processes have the same, and choose the same. With one process
nothing happens here. Tensors on the CPU go by gloo, those on a GPU by nccl.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ssmc.runtime.ranks import is_first, rank, ranks

PIECE = 4 << 20  # numbers that are added up at once


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Where torchrun started several processes, they are joined inside the block."""
    import torch.distributed as dist

    if ranks() == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def share(tokens: torch.Tensor | None) -> torch.Tensor | None:
    """The samples (nsamples, seqlen) of this process: one in so many as there are processes."""
    return tokens if tokens is None or ranks() == 1 else tokens[rank() :: ranks()]


def share_of(first: int) -> int:
    """How many of the first samples of all are this process's."""
    return len(range(rank(), first, ranks()))


def own(numbers: Sequence[int]) -> list[int]:
    """Of numbered samples those of this process, as numbers within its own `share`."""
    return [number // ranks() for number in numbers if number % ranks() == rank()]


def of_all(count: int) -> int:
    """How many samples all processes have, if this one has `count`."""
    return round(summed(count))


def summed(value: torch.Tensor | float) -> Any:
    """The sum of what the processes have: a tensor of the same shape and type, or a number."""
    if ranks() == 1:
        return value
    if not isinstance(value, torch.Tensor):
        return float(summed(torch.tensor(value, dtype=torch.float64)))
    import torch.distributed as dist

    flat = value.detach().clone(memory_format=torch.contiguous_format).view(-1)
    for piece in flat.split(PIECE):
        parts = [torch.empty_like(piece) for _ in range(ranks())]
        dist.all_gather(parts, piece)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        piece.copy_(total)
    return flat.view(value.shape)


def summed_each(values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """As `summed`, of tensors of one type, together."""
    if ranks() == 1:
        return list(values)
    flat = summed(torch.cat([value.detach().reshape(-1) for value in values]))
    parts = flat.split([value.numel() for value in values])
    return [part.view(value.shape) for part, value in zip(parts, values, strict=True)]


def gathered(piece: torch.Tensor) -> list[torch.Tensor]:
    """What each process has, in their order: tensors that differ in their first dimension only."""
    if ranks() == 1:
        return [piece]
    import torch.distributed as dist

    length = torch.tensor(len(piece), device=piece.device)
    lengths = [torch.empty_like(length) for _ in range(ranks())]
    dist.all_gather(lengths, length)
    counts = [int(count) for count in lengths]
    padded = piece.new_zeros(max(counts), *piece.shape[1:])
    padded[: len(piece)] = piece.detach()
    parts = [torch.empty_like(padded) for _ in range(ranks())]
    dist.all_gather(parts, padded)
    return [part[:count] for part, count in zip(parts, counts, strict=True)]


@dataclass(frozen=True)
class Dealt:
    """Numbered pieces of work, dealt out to the processes in their order, so many at a time.

    Processes that were not joined do all of it.
    """

    count: int
    size: int = 1

    @property
    def own(self) -> list[slice]:
        """What this process does."""
        return self._of(rank()) if _are_joined() else self._all

    def together(self, done: torch.Tensor) -> torch.Tensor:
        """All results (count, ...), from those (n, ...) of this process, in its order."""
        if not _are_joined():
            return done
        whole = done.new_zeros(self.count, *done.shape[1:])
        for number, part in enumerate(gathered(done)):
            for piece, results in zip(self._of(number), part.split(self.size), strict=True):
                whole[piece] = results
        return whole

    def values(self, done: Sequence[Any]) -> list[Any]:
        """As `together`, of what JSON can say."""
        if not _are_joined():
            return list(done)
        whole: list[Any] = [None] * self.count
        for number, part in enumerate(gathered(_as_bytes(json.dumps(list(done))))):
            results = iter(json.loads(_as_text(part)))
            for piece in self._of(number):
                whole[piece] = [next(results) for _ in range(piece.start, piece.stop)]
        return whole

    @property
    def _all(self) -> list[slice]:
        starts = range(0, self.count, self.size)
        return [slice(start, min(start + self.size, self.count)) for start in starts]

    def _of(self, number: int) -> list[slice]:
        return self._all[number :: ranks()]


def from_first(value: Any = None) -> Any:
    """What the first process has, of what JSON can say; what the others give does not count."""
    if ranks() == 1:
        return value
    return json.loads(_as_text(gathered(_as_bytes(json.dumps(value) if is_first() else ""))[0]))


def all_alike(text: str) -> bool:
    """Whether all processes have the same; all of them are told."""
    digest = _as_bytes(hashlib.sha256(text.encode()).hexdigest())
    return all(torch.equal(part, digest) for part in gathered(digest))


def _are_joined() -> bool:
    import torch.distributed as dist

    return ranks() > 1 and dist.is_initialized()


def _as_bytes(text: str) -> torch.Tensor:
    content = bytearray(text.encode())
    return torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)


def _as_text(content: torch.Tensor) -> str:
    return bytes(content.numpy()).decode()
