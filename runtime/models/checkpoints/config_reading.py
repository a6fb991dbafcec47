"""From the content of a transformers config.json to a configuration, old words and new ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from ssmc.runtime.errors import CheckpointError

LAYERS = "num_hidden_layers"
REQUIRED = ("vocab_size", "hidden_size", LAYERS)
LISTS = ("layers_block_type", "hybrid_override_pattern")  # name every layer, so that nobody needs to count
DTYPE_KEYS = ("dtype", "torch_dtype")  # transformers 5, and before
_SPECIAL = ("Infinity", "-Infinity", "NaN")
_MOST_LAYERS = 10_000  # transformers makes lists of this length before anything can be compared with the weights

# Set anew when writing, or (the last) no part of the model: it may name a path of the machine that wrote it.
NOT_PASSED_ON = ("model_type", "transformers_version", "_name_or_path", *DTYPE_KEYS)


def read_config(raw: Mapping[str, Any], path: Path) -> PretrainedConfig:
    """A transformers configuration from the content of config.json.

    Raises:
        CheckpointError: a size is missing or makes no sense.
    """
    listed = any(name in raw for name in LISTS)
    missing = [key for key in REQUIRED if key not in raw and not (key == LAYERS and listed)]
    if missing:
        raise CheckpointError(f"{path} does not say {', '.join(missing)}. Copy the model's own config.json.")
    return make_config(raw["model_type"], {k: _plain(v) for k, v in raw.items() if k not in NOT_PASSED_ON}, path)


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
        raise CheckpointError(f"{path} has {layers} layers, which makes no sense. Correct it.")
    try:
        return CONFIG_MAPPING[model_type](**values)
    except Exception as error:  # the strict dataclasses, torch and transformers each raise their own
        reason = " ".join(str(error).split()).rstrip(".")
        raise CheckpointError(f"{path} has a value that makes no sense ({reason}). Correct it.") from error
