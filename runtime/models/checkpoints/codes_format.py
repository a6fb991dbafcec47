"""The layout `pack-quantized` of compressed-tensors, read as the numbers its codes stand for; else transformers' own.

A linear map has `NAME_packed` (out, in x bits / 32), int32, `NAME_scale` (out, groups), `NAME_shape` and, where
the grid is not symmetric, `NAME_zero_point`, packed along its rows. `ssmc.exporters.compressed_tensors` writes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from ssmc.runtime.errors import CheckpointError, UsageError
from ssmc.runtime.models.checkpoints import transformers_format
from ssmc.runtime.models.checkpoints.reading import read_json, read_tensors
from ssmc.runtime.progress import NO_PROGRESS, Progress
from ssmc.runtime.quantized import GridShape, Quantized

NAME = "compressed-tensors"
LAYOUT = "pack-quantized"
SETTINGS = "quantization_config"  # key of config.json
EXTRA = "pip install 'ssmc[compressed-tensors]'"
PACKED, SCALE, SHAPE, ZERO = "_packed", "_scale", "_shape", "_zero_point"
WORD = 32  # bits of a packed number


def recognises(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is in this layout."""
    settings = raw.get(SETTINGS)
    return isinstance(settings, dict) and (settings.get("quant_method"), settings.get("format")) == (NAME, LAYOUT)


def is_packed(where: str | Path) -> bool:
    """Whether a folder holds a model in this layout."""
    path = Path(where).expanduser() / "config.json"
    return path.is_file() and recognises(read_json(path))


def read_config(raw: Mapping[str, Any], path: Path) -> PretrainedConfig:
    """A transformers configuration from the content of config.json: in memory nothing is packed.

    Raises:
        CheckpointError: a size is missing or makes no sense.
    """
    return transformers_format.read_config(words_of(raw), path)


def words_of(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The content of config.json without what it says of the codes."""
    return {key: value for key, value in raw.items() if key != SETTINGS}


def check_package(device: str = "cpu") -> None:
    """Refuse where the package that unpacks codes is missing.

    Args:
        device: any; codes are unpacked while they are read.

    Raises:
        UsageError: it cannot be imported.
    """
    del device
    try:
        import compressed_tensors  # noqa: F401
    except ImportError as error:
        raise UsageError(f"Reading packed codes needs compressed-tensors: {EXTRA}.") from error


def read(directory: Path, progress: Progress = NO_PROGRESS, lazy: bool = False) -> dict[str, torch.Tensor]:
    """All tensors by the names in the files, codes as numbers in the dtype of their scales, which takes reading them.

    Raises:
        CheckpointError: a file is missing or damaged.
        UsageError: the package that unpacks codes is missing.
    """
    check_package()
    stored = read_tensors(directory, progress)
    weights = {name.removesuffix(PACKED): packed for name, packed in stored.items() if name.endswith(PACKED)}
    parts = {weight + ending for weight in weights for ending in (PACKED, SCALE, SHAPE, ZERO)}
    tensors = {name: tensor for name, tensor in stored.items() if name not in parts}
    for weight in weights:
        if lost := [weight + ending for ending in (SCALE, SHAPE) if weight + ending not in stored]:
            raise CheckpointError(f"{directory} has {weight}{PACKED} and no {lost[0]}. Copy the model again.")
        try:
            tensors[weight] = _unpacked(*(stored.get(weight + ending) for ending in (PACKED, SCALE, SHAPE, ZERO)))
        except (ValueError, RuntimeError) as error:
            raise CheckpointError(f"{directory}: the parts of {weight} do not fit together. Copy it again.") from error
    return tensors


def _unpacked(
    packed: torch.Tensor, scale: torch.Tensor, shape: torch.Tensor, zero: torch.Tensor | None
) -> torch.Tensor:
    """The numbers of one weight, (out, in); codes and zero points are signed in these files."""
    from compressed_tensors.compressors.pack_quantized import unpack_from_int32

    out, inputs = (int(size) for size in shape)
    bits = packed.shape[1] * WORD // inputs
    codes = unpack_from_int32(packed, bits, torch.Size((out, inputs)))
    if zero is not None:
        zero = unpack_from_int32(zero, bits, torch.Size(scale.shape), packed_dim=0)
    grid = GridShape(bits, inputs // scale.shape[1], zero is None)
    return Quantized(grid, codes, scale.float(), zero).weight().to(scale.dtype)
