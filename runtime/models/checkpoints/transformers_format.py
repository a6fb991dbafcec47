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
from transformers import PretrainedConfig

from ssmc.runtime.models.checkpoints.config_reading import read_config
from ssmc.runtime.models.checkpoints.reading import read_tensors
from ssmc.runtime.models.checkpoints.stored_config import in_new_words, in_own_words
from ssmc.runtime.models.checkpoints.writing import Shards
from ssmc.runtime.progress import NO_PROGRESS, Progress

NAME = "transformers"
__all__ = ["NAME", "main_dtype", "read", "read_config", "recognises", "words_of", "write", "write_config"]


def recognises(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is in this layout."""
    return "model_type" in raw


def words_of(raw: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The content of config.json, to write a model of other sizes in the same words."""
    return raw


def read(directory: Path, progress: Progress = NO_PROGRESS, lazy: bool = False) -> dict[str, torch.Tensor]:
    """All stored tensors, whose names are transformers' own; errors as `read_tensors`."""
    return read_tensors(directory, progress, lazy=lazy)


def write(
    directory: Path,
    tensors: Mapping[str, torch.Tensor],
    config: PretrainedConfig,
    max_shard_size: int | str,
    stored: Mapping[str, Any] | None = None,
    marks: Mapping[str, Any] = MappingProxyType({}),
) -> list[Path]:
    """Write config.json and safetensors; same input, same bytes.

    Args:
        directory: exists.
        tensors: by transformers' names, without a tied head; deferred ones are made one after the other.
        config: of the model.
        max_shard_size: bytes, or like "5GB"; above it the weights go to several files with an index.
        stored: the config.json that `config` was read from, in this layout; None where it was another one.
        marks: more keys of config.json.
    """
    written = [write_config(directory / "config.json", tensors, config, stored, marks)]
    shards = Shards(directory, tensors, max_shard_size)
    shards.put(tensors)
    return written + shards.close()


def main_dtype(tensors: Mapping[str, torch.Tensor]) -> torch.dtype:
    """The dtype most numbers of a model have, codes of quantised ones aside."""
    numbers: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        if tensor.is_floating_point():
            numbers[tensor.dtype] += tensor.numel()
    return max(numbers, key=lambda dtype: (numbers[dtype], str(dtype)))


def write_config(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    config: PretrainedConfig,
    stored: Mapping[str, Any] | None = None,
    marks: Mapping[str, Any] = MappingProxyType({}),
) -> Path:
    """Write config.json for these tensors, in the words of `stored` if there are any, with `marks` as extra keys."""
    dtype = main_dtype(tensors)
    if stored is None:
        config = copy.deepcopy(config)
        config.dtype = dtype
        content = in_new_words(config)
    else:
        content = in_own_words(stored, config, dtype)
    text = json.dumps(content | dict(marks), indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8", newline="\n")
    return path
