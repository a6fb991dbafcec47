"""Files of weights nobody has vouched for, read as a whole or tensor by tensor; nothing in them is executed.

Weights come from safetensors, or from PyTorch's .bin through `torch.load(weights_only=True)`, which builds tensors and
plain containers and refuses everything else a pickle could do.
"""

from __future__ import annotations

import errno
import pickle
import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open

from ssmc.runtime.errors import CheckpointError
from ssmc.runtime.models.checkpoints.deferred import deferred

_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_TYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
_TYPES |= {"BOOL": torch.bool}
"""As safetensors names them."""

R = TypeVar("R")
_EXPLAINED = (SafetensorError, RuntimeError)  # errors whose text means something to a reader


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    def read() -> dict[str, torch.Tensor]:
        with safe_open(path, framework="pt") as file:
            return {name: _aligned(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118

    return _explained(path, read)


def _explained(path: Path, read: Callable[[], R]) -> R:
    """What `read` reads from a safetensors file, with its errors as sentences."""
    try:
        return read()
    except OSError as error:
        raise unreadable(path, error) from error
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise _damaged(path, error) from error


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy if a file of mixed dtypes put the tensor where compiled kernels could not read it."""
    return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor


def _read_bin(path: Path, mapped: bool = False) -> dict[str, torch.Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols and old storage classes
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError as error:
        if error.errno == errno.EINVAL:  # torch seeks to before the start of a file that is too short
            raise _damaged(path, error) from error
        raise unreadable(path, error) from error
    except pickle.UnpicklingError as error:
        call = re.search(r"GLOBAL ([\w.]+\w)", str(error))
        what = f"is a pickle that calls {call[1]}" if call else "is damaged, or a pickle of more than tensors"
        raise CheckpointError(
            f"{path} {what}; nothing of it was run. Copy it again, or get the model as safetensors."
        ) from error
    except Exception as error:  # torch, zip and pickle raise many kinds on damaged bytes
        raise _damaged(path, error) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors by name.")
    for name, value in content.items():
        if not (isinstance(name, str) and isinstance(value, torch.Tensor)):
            raise CheckpointError(
                f"{path} holds {name!r}, which is no tensor. Save the model's state dict alone and try again."
            )
    return {name: value.detach() for name, value in content.items()}


class OpenFile:
    """A file of weights that is open: its tensors are read one by one, when they are wanted.

    Whoever overwrites the file meanwhile would have a model made of two, so that is looked for before every read.
    """

    def __init__(self, path: Path):
        self.path, self._stamp = path, _stamp(path)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of its tensors by name, deferred."""
        raise NotImplementedError

    def check(self) -> None:
        """Make sure that the file is what it was when it was opened.

        Raises:
            CheckpointError: it was changed or removed.
        """
        if _stamp(self.path) != self._stamp:
            raise CheckpointError(f"{self.path} was changed while it was read. Run again when it is complete.")


class OpenSafetensors(OpenFile):
    """By safetensors' own reading of single tensors, which maps nothing into memory."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._file = _explained(path, lambda: safe_open(path, framework="pt", backend="pread"))

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of its tensors by name, deferred."""
        return {name: self._tensor(name) for name in self._file.keys()}  # noqa: SIM118

    def _tensor(self, name: str) -> torch.Tensor:
        part = self._file.get_slice(name)
        shape, dtype = part.get_shape(), _TYPES.get(part.get_dtype())
        if dtype is None:  # one that torch has, and no model
            return _explained(self.path, lambda: self._file.get_tensor(name))
        return deferred(torch.empty(shape, dtype=dtype, device="meta"), partial(self._read, name))

    def _read(self, name: str) -> torch.Tensor:
        self.check()
        return _explained(self.path, lambda: self._file.get_tensor(name))


class OpenBin(OpenFile):
    """By torch's mapping of a file, which is mapped anew before too much of it has become resident."""

    MOST = 256 << 20  # bytes

    def __init__(self, path: Path):
        super().__init__(path)
        self._mapped: dict[str, torch.Tensor] = {}
        self._read_so_far = 0

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of its tensors by name, deferred; those themselves of a file of a kind that torch cannot map."""
        try:
            self._mapped = _read_bin(self.path, mapped=True)
        except CheckpointError:
            return _read_bin(self.path)
        return {name: deferred(tensor.to("meta"), partial(self._read, name)) for name, tensor in self._mapped.items()}

    def _read(self, name: str) -> torch.Tensor:
        self.check()
        if self._read_so_far > self.MOST:
            self._mapped, self._read_so_far = {}, 0
            self._mapped = _read_bin(self.path, mapped=True)
        tensor = self._mapped[name].clone()
        self._read_so_far += tensor.nbytes
        return tensor


READERS: dict[tuple[bool, bool], Callable[[Path], dict[str, torch.Tensor]]] = {
    (True, False): _read_safetensors,
    (False, False): _read_bin,
    (True, True): lambda path: OpenSafetensors(path).tensors(),
    (False, True): lambda path: OpenBin(path).tensors(),
}
"""Whether it is safetensors, whether it is only to be opened -> what reads a file."""


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise unreadable(path, error) from error
    return found.st_ino, found.st_size, found.st_mtime_ns


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """What to raise where the system refuses to read a file."""
    return CheckpointError(f"{path} cannot be read: {error.strerror or error}. Check that it is there and readable.")


def _damaged(path: Path, error: Exception) -> CheckpointError:
    reason = str(error).strip().split("\n")[0].split(". ")[0].rstrip(".") if isinstance(error, _EXPLAINED) else ""
    return CheckpointError(
        f"{path} is damaged or incomplete{f' ({reason})' if reason else ''}. Copy or download it again."
    )
