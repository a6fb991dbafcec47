"""transformers' layout: config.json with a `model_type`, and model.safetensors, in one file or in shards.

A tied lm_head is not stored, `vocab_size` counts the embedding's rows with their padding, and keys of config.json that
transformers does not know are kept.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, PretrainedConfig

from ssmc.runtime.errors import CheckpointError
from ssmc.runtime.models.checkpoints.reading import read_tensors
from ssmc.runtime.progress import Progress, silent

NAME = "transformers"
LAYERS = "num_hidden_layers"
REQUIRED = ("vocab_size", "hidden_size", LAYERS)
LISTS = ("layers_block_type", "hybrid_override_pattern")  # name every layer, so that nobody needs to count
DTYPE_KEYS = ("dtype", "torch_dtype")  # transformers 5, and before
_SPECIAL = ("Infinity", "-Infinity", "NaN")
_MOST_LAYERS = 10_000  # transformers makes lists of this length before anything can be compared with the weights

# Set anew when writing, or (the last) no part of the model: it may name a path of the machine that wrote it.
_NOT_PASSED_ON = ("model_type", "transformers_version", "_name_or_path", *DTYPE_KEYS)


def recognises(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is in this layout."""
    return "model_type" in raw


def read_config(raw: Mapping[str, Any], path: Path) -> PretrainedConfig:
    """A transformers configuration from the content of config.json.

    Raises:
        CheckpointError: a size is missing or makes no sense.
    """
    listed = any(name in raw for name in LISTS)
    missing = [key for key in REQUIRED if key not in raw and not (key == LAYERS and listed)]
    if missing:
        raise CheckpointError(f"{path} does not say {', '.join(missing)}. Copy the model's own config.json.")
    return make_config(raw["model_type"], {k: _plain(v) for k, v in raw.items() if k not in _NOT_PASSED_ON}, path)


def _plain(value: Any) -> Any:
    """A value of config.json with transformers' stand-ins for numbers that JSON has not, {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        special = value.get("__float__") if len(value) == 1 else None
        return float(special) if special in _SPECIAL else {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list) else value


def make_config(model_type: str, values: Mapping[str, Any], path: Path) -> PretrainedConfig:
    """Build transformers' configuration of a family.

    Raises:
        CheckpointError: transformers refuses a value.
    """
    layers = values.get(LAYERS)
    if isinstance(layers, int) and layers > _MOST_LAYERS:
        raise CheckpointError(f"{path} speaks of {layers} layers, which makes no sense. Mend it.")
    try:
        return CONFIG_MAPPING[model_type](**values)
    except Exception as error:  # the strict dataclasses, torch and transformers each raise their own
        reason = " ".join(str(error).split()).rstrip(".")
        raise CheckpointError(f"{path} has a value that makes no sense ({reason}). Mend it.") from error


def read(directory: Path, progress: Progress = silent) -> dict[str, torch.Tensor]:
    """All stored tensors, whose names are transformers' own; errors as `read_tensors`."""
    return read_tensors(directory, progress)


def write(
    directory: Path, tensors: Mapping[str, torch.Tensor], config: PretrainedConfig, max_shard_size: int | str
) -> list[Path]:
    """Write config.json and safetensors; same input, same bytes.

    Args:
        directory: exists.
        tensors: by transformers' names, contiguous, without a tied head.
        config: of the model.
        max_shard_size: bytes, or like "5GB"; above it the weights go to several files with an index.
    """
    split = split_torch_state_dict_into_shards(
        dict(tensors), filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    written = [write_config(directory / "config.json", tensors, config)]
    for filename, names in split.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, directory / filename, metadata={"format": "pt"})
        written.append(directory / filename)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        written.append(directory / "model.safetensors.index.json")
        written[-1].write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8", newline="\n")
    return written


def main_dtype(tensors: Mapping[str, torch.Tensor]) -> torch.dtype:
    """The dtype most numbers of a model have."""
    numbers: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        numbers[tensor.dtype] += tensor.numel()
    return max(numbers, key=lambda dtype: (numbers[dtype], str(dtype)))


def write_config(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    config: PretrainedConfig,
    marks: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Write config.json for these tensors, with `marks` as extra keys."""
    config = copy.deepcopy(config)
    config.dtype = main_dtype(tensors)
    for key, value in marks.items():
        setattr(config, key, value)
    path.write_text(config.to_json_string(use_diff=True), encoding="utf-8", newline="\n")
    return path
