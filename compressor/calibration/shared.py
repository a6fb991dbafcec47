"""Calibration by several processes: each reads a share of the samples, and sums are added up in the order of the ranks.

So all processes have the same sums, to the last bit, and choose the same. With one process nothing happens here.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any

import torch

from ssmc.runtime.ranks import rank, ranks

PIECE = 4 << 20  # numbers that are added up at once


def join(device: torch.device) -> torch.device:
    """Meet the other processes; the device of this one."""
    import torch.distributed as dist

    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def leave() -> None:
    """Part from the other processes."""
    import torch.distributed as dist

    if ranks() > 1 and dist.is_initialized():
        dist.destroy_process_group()


def share(tokens: torch.Tensor | None) -> torch.Tensor | None:
    """The samples (nsamples, seqlen) of this process: one in so many as there are processes."""
    return tokens if tokens is None or ranks() == 1 else tokens[rank() :: ranks()]


def share_of(first: int) -> int:
    """How many of the first samples of all are this process's."""
    return len(range(rank(), first, ranks()))


def summed(value: torch.Tensor | float) -> Any:
    """The sum of what the processes have: a tensor of the same shape and type, or a number."""
    if ranks() == 1:
        return value
    if not isinstance(value, torch.Tensor):
        return float(summed(torch.tensor(value, dtype=torch.float64)))
    import torch.distributed as dist

    flat = value.detach().contiguous().view(-1)
    for piece in flat.split(PIECE):
        parts = [torch.empty_like(piece) for _ in range(ranks())]
        dist.all_gather(parts, piece)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        piece.copy_(total)
    return flat.view(value.shape)


def from_first(text: str | None, device: torch.device) -> str:
    """What the first process says; the others give None. It goes as bytes: nothing is unpickled."""
    if ranks() == 1:
        return text or ""
    import torch.distributed as dist

    said = torch.frombuffer(bytearray((text or "").encode() or b" "), dtype=torch.uint8).to(device)
    length = torch.tensor(len(said), device=device)
    dist.broadcast(length, 0)
    content = said if rank() == 0 else torch.empty(int(length), dtype=torch.uint8, device=device)
    dist.broadcast(content, 0)
    return bytes(content.cpu().numpy()).decode().strip()


def all_alike(text: str, device: torch.device) -> bool:
    """Whether all processes have the same; all of them are told."""
    if ranks() == 1:
        return True
    import torch.distributed as dist

    own = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8).to(device)
    parts = [torch.empty_like(own) for _ in range(ranks())]
    dist.all_gather(parts, own)
    return all(torch.equal(part, own) for part in parts)
