"""safetensors files written tensor by tensor, in any order: the bytes that safetensors' own `save_file` would write.

The library writes all tensors of a file at once, so they would all have to be in memory. Where each tensor lies follows
from names, types and shapes alone (https://github.com/huggingface/safetensors, Format), so room is made for all of them
first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.serialization import split_state_dict_into_shards_factory

from ssmc.runtime.files import make_room
from ssmc.runtime.models.checkpoints.deferred import real

PATTERN = "model{suffix}.safetensors"
INDEX = "model.safetensors.index.json"
_NAMES = {torch.int64: "I64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16", torch.float16: "F16"}
_NAMES |= {torch.uint8: "U8"}
"""In the order that the library gives them, wider ones first, for their alignment."""
_METADATA = {"format": "pt"}


class Shards:
    """The weights of a model in one file or several, as many as `most` bytes for each ask for.

    Args:
        directory: exists.
        outlines: by their names in the files, tensors of the shapes and types that will be written; deferred ones do.
        most: bytes of a file, or like "5GB".
        again: whether the files are there already, from a run that was cut off; what they hold stays.
    """

    def __init__(self, directory: Path, outlines: Mapping[str, torch.Tensor], most: int | str, again: bool = False):
        self.directory = directory
        self._split = split_state_dict_into_shards_factory(
            dict(outlines), get_storage_size=lambda t: t.nbytes, filename_pattern=PATTERN, max_shard_size=most
        )
        self.made: list[Path] = []  # files that were not there
        self._places: dict[str, tuple[Path, int, torch.dtype, torch.Size]] = {}
        for name, names in self._split.filename_to_tensors.items():
            self._make(directory / name, {key: outlines[key] for key in names}, again)

    @property
    def files(self) -> list[Path]:
        """The files that hold tensors."""
        return [self.directory / name for name in self._split.filename_to_tensors]

    def put(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write some of the tensors to their places.

        Raises:
            OSError: the system refuses.
        """
        for name, tensor in tensors.items():
            path, offset, dtype, shape = self._places[name]
            tensor = real(tensor).detach().to("cpu").contiguous()
            if (tensor.dtype, tensor.shape) != (dtype, shape):
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {tuple(shape)}")
            _write(path, offset, tensor)

    def read(self, name: str) -> torch.Tensor:
        """A tensor that was put."""
        path, offset, dtype, shape = self._places[name]
        with path.open("rb") as file:
            file.seek(offset)
            return torch.frombuffer(bytearray(file.read(shape.numel() * dtype.itemsize)), dtype=dtype).view(shape)

    def close(self) -> list[Path]:
        """Write the index of several files; all files."""
        if not self._split.is_sharded:
            return self.files
        index = {"metadata": self._split.metadata, "weight_map": self._split.tensor_to_filename}
        path = self.directory / INDEX
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8", newline="\n")
        return [*self.files, path]

    def _make(self, path: Path, outlines: Mapping[str, torch.Tensor], again: bool) -> None:
        """Write the header of a file and make room for its tensors."""
        order = list(_NAMES)
        header: dict[str, Any] = {"__metadata__": _METADATA}
        end = 0
        for name in sorted(outlines, key=lambda name: (order.index(outlines[name].dtype), name)):
            tensor = outlines[name]
            start, end = end, end + tensor.nbytes
            header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        text = len(text).to_bytes(8, "little") + text
        for name, tensor in outlines.items():
            start = len(text) + header[name]["data_offsets"][0]
            self._places[name] = (path, start, tensor.dtype, tensor.shape)
        if not (again and path.is_file() and path.stat().st_size == len(text) + end):
            self.made.append(path)
            with path.open("wb") as file:
                file.write(text)
                make_room(file, len(text) + end)


def _write(path: Path, offset: int, tensor: torch.Tensor) -> None:
    content = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
    with path.open("r+b", buffering=0) as file:
        file.seek(offset)
        while content:
            content = content[file.write(content) :]
