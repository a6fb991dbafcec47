"""ssmc's own layout for 2:4 models: transformers' config.json with a mark, and one file of packed tensors.

Every 2:4 matrix becomes two tensors (`ssmc.runtime.sparse24`), its name plus `.sparse24_values` and
`.sparse24_indices`. All others are stored as they are. No other software reads this; the name of the file keeps stock
loaders from trying, and README.md beside it tells people.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PretrainedConfig

from ssmc.runtime.errors import CheckpointError
from ssmc.runtime.models.checkpoints import transformers_format
from ssmc.runtime.models.checkpoints.reading import read_tensors
from ssmc.runtime.models.checkpoints.sources import PACKED_FILE
from ssmc.runtime.progress import NO_PROGRESS, Progress
from ssmc.runtime.sparse24 import Packed24, is_24, pack24, unpack24

NAME = "sparse24-packed"
FILE = PACKED_FILE
MARK = "ssmc_storage"  # key of config.json
VALUES, INDICES = ".sparse24_values", ".sparse24_indices"

_README = f"""# Only ssmc reads this folder

The weights in `{FILE}` are packed: of every 2:4 matrix only the two kept numbers of each group of
four are stored, as `NAME{VALUES}` (out, in / 2), and their positions, as `NAME{INDICES}`
(out, in / 8), uint8: four bits a group, even groups low; of those, two bits for the first position and two for the
second. transformers, vLLM and other software cannot load it. To get a checkpoint that they load:

    ssmc export DIR --format sparse24

To load it: `model, tokenizer = ssmc.load("this folder")`.
"""


def recognises(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is in this layout."""
    return raw.get(MARK) == NAME


def read_config(raw: Mapping[str, Any], path: Path) -> PretrainedConfig:
    """A transformers configuration from the content of config.json, without the mark: in memory nothing is packed.

    Raises:
        CheckpointError: a size is missing or makes no sense.
    """
    return transformers_format.read_config({key: value for key, value in raw.items() if key != MARK}, path)


def read(directory: Path, progress: Progress = NO_PROGRESS, lazy: bool = False) -> dict[str, torch.Tensor]:
    """All tensors by transformers' names, unpacked, which takes reading them.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    stored = read_tensors(directory, progress, files=(FILE,))
    try:
        return unpack_tensors(stored)
    except ValueError as error:
        raise CheckpointError(f"{directory / FILE} is damaged: {error}. Export it again.") from error


def words_of(raw: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The content of config.json without the mark, to write a model of other sizes in the same words."""
    return {key: value for key, value in raw.items() if key != MARK}


def write(
    directory: Path,
    tensors: Mapping[str, torch.Tensor],
    config: PretrainedConfig,
    max_shard_size: int | str,
    stored: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write config.json, the packed file and a README; same input, same bytes.

    Args:
        directory: exists.
        tensors: by transformers' names, contiguous, without a tied head.
        config: of the model.
        max_shard_size: not used, there is one file.
        stored: the config.json that `config` was read from, in transformers' layout; None where it was another one.
    """
    del max_shard_size
    written = [transformers_format.write_config(directory / "config.json", tensors, config, stored, {MARK: NAME})]
    # one key of metadata: safetensors writes several in any order, and the same input shall give the same bytes
    save_file(pack_tensors(tensors), directory / FILE, metadata={"layout": NAME})
    (directory / "README.md").write_text(_README, encoding="utf-8", newline="\n")
    return [*written, directory / FILE, directory / "README.md"]


def pack_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the file holds: every 2:4 matrix as values and indices, the rest unchanged."""
    stored = {}
    for name, tensor in tensors.items():
        if is_24(tensor):
            packed = pack24(tensor)
            stored |= {name + VALUES: packed.values, name + INDICES: packed.indices}
        else:
            stored[name] = tensor
    return stored


def unpack_tensors(stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors that `pack_tensors` packed.

    Raises:
        ValueError: a half of a packed matrix is missing, or the halves do not belong together.
    """
    tensors = {}
    for name, tensor in stored.items():
        base, half = next(((name.removesuffix(s), s) for s in (VALUES, INDICES) if name.endswith(s)), (name, ""))
        if half and not (base + VALUES in stored and base + INDICES in stored):
            raise ValueError(f"{name} has no other half")
        if half and base in stored:
            raise ValueError(f"{base} is stored twice")
        if half == VALUES:
            tensors[base] = _unpack(base, Packed24(tensor, stored[base + INDICES]))
        elif not half:
            tensors[name] = tensor
    return tensors


def _unpack(name: str, packed: Packed24) -> torch.Tensor:
    try:
        return unpack24(packed)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
