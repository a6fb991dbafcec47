"""Hidden states in a file instead of memory: tensors like others, whose pages leave memory when they were used."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from pathlib import Path
from weakref import WeakValueDictionary

import torch

from ssmc.runtime.files import make_room

_MAPPED: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()
"""Address of a storage -> the file it is, as long as there is a tensor of it."""


def on_disk(shape: Sequence[int], folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor in a new file of a folder, not filled; the file has no name any more once the folder is gone.

    Raises:
        OSError: the disk has no room for it.
    """
    folder.mkdir(exist_ok=True)
    path = folder / f"{len(list(folder.iterdir()))}.hidden"
    size = math.prod(shape) * dtype.itemsize
    with path.open("w+b") as file:
        make_room(file, size)
        mapped = mmap.mmap(file.fileno(), size)
    tensor = torch.frombuffer(mapped, dtype=dtype).view(*shape)
    _MAPPED[tensor.untyped_storage().data_ptr()] = mapped
    return tensor


def release(piece: torch.Tensor) -> None:
    """Let what a tensor has of a file leave memory; others stay as they are."""
    if not _MAPPED or (mapped := _MAPPED.get(piece.untyped_storage().data_ptr())) is None:
        return
    if hasattr(mmap, "MADV_DONTNEED"):
        start = piece.storage_offset() * piece.element_size() // mmap.PAGESIZE * mmap.PAGESIZE
        mapped.madvise(mmap.MADV_DONTNEED, start, min(piece.nbytes + mmap.PAGESIZE, len(mapped) - start))
