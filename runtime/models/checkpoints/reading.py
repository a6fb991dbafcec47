"""Read the JSON and the tensors of a model directory nobody has vouched for: nothing in it is ever executed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ssmc.runtime.errors import CheckpointError
from ssmc.runtime.models.checkpoints.weight_files import READERS, unreadable
from ssmc.runtime.progress import NO_PROGRESS, Progress

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
HEAD = "lm_head.weight"
_ADAPTER = "adapter_config.json"  # of peft
_ADAPTERS = (_ADAPTER, "adapter_model.safetensors", "adapter_model.bin")
_QUANTISED = ("quantization_config", "compression_config", "quantization")  # in config.json; the last is MLX's


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))  # which a byte order mark may begin
    except OSError as error:
        raise unreadable(path, error) from error
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{path} is not JSON (line {error.lineno}: {error.msg}). Correct it or copy it again."
        ) from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON text. Copy it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}, not an object. Copy it again.")
    return content


def read_tensors(
    directory: Path, progress: Progress = NO_PROGRESS, files: Sequence[str] = SINGLE_FILES, *, lazy: bool = False
) -> dict[str, torch.Tensor]:
    """Read all tensors of a model directory, from one file or from shards with an index.

    safetensors is preferred to .bin, and a single file to shards, as transformers does. Tensors of safetensors files
    are mapped, not copied, so the files must not be overwritten in place while they are in use.

    Args:
        directory: holds model.safetensors, pytorch_model.bin, or either of their names plus `.index.json`.
        progress: told about every file.
        files: other names to look for than these two.
        lazy: open the files only, see `opened`.

    Returns:
        Tensors on the CPU by name, of whatever dtype is stored.

    Raises:
        CheckpointError: there are no weights, or a file is damaged, missing, or holds more than tensors.
    """
    for single in files:
        index = directory / f"{single}.index.json"
        if os.path.lexists(directory / single):
            return _read_shards([directory / single], progress, lazy)
        if os.path.lexists(index):
            return _read_indexed(index, Path(single).suffix, progress, lazy)
    if (directory / "model.onnx").is_file():
        raise CheckpointError(
            f"{directory} is an export to ONNX, which torch cannot read: `ssmc generate`, `ssmc eval` "
            "and `ssmc bench` take it. Name the model it was made from."
        )
    raise CheckpointError(
        f"{directory} holds no weights: none of {', '.join(files)} or their .index.json is in it. "
        "Download or copy the model again."
    )


def _read_indexed(index: Path, suffix: str, progress: Progress, lazy: bool) -> dict[str, torch.Tensor]:
    """Read the shards an index names; both must agree on which tensors there are."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f'{index} has no "weight_map" that gives every tensor its file. Copy it again.')
    names = sorted(set(weight_map.values()))
    for name in names:
        # an index must not reach outside its folder, nor bring in another kind of file
        if Path(name).name != name or "\\" in name or Path(name).suffix != suffix:
            raise CheckpointError(f"{index} names {name!r}, which is not a {suffix} file beside it. Copy it again.")
        if not os.path.isfile(index.parent / name):  # which takes any name, also one that no system can have
            raise CheckpointError(f"{index.parent / name} is missing, though {index.name} names it. Copy it again.")
    tensors = _read_shards([index.parent / name for name in names], progress, lazy)
    for what, missing in (
        # whether a head is missing is for whoever knows the configuration to say: it may be the embedding
        ("the index names but no shard holds", weight_map.keys() - tensors.keys() - {HEAD}),
        ("a shard holds but the index does not name", tensors.keys() - weight_map.keys() - {HEAD}),
    ):
        if missing:
            raise CheckpointError(f"{index} and its shards disagree: {what} {some_of(missing)}. Copy the model again.")
    return tensors


def _read_shards(paths: list[Path], progress: Progress, lazy: bool) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for done, path in enumerate(paths):
        progress("reading the weights", done, len(paths))
        if not path.is_file():
            raise CheckpointError(f"{path} is not a file. Copy the model again.")
        if path.stat().st_size == 0:
            raise CheckpointError(f"{path} is empty. Copy the model again.")
        shard = READERS[path.suffix == ".safetensors", lazy](path)
        if twice := tensors.keys() & shard.keys():
            raise CheckpointError(
                f"{path} holds {some_of(twice)}, which another shard holds too. Copy the model again."
            )
        tensors |= shard
    progress("reading the weights", len(paths), len(paths))
    return tensors


def refuse_quantised(config: Mapping[str, Any], where: str) -> None:
    """Refuse a model whose config.json says that its weights are quantised.

    Raises:
        CheckpointError: saying by what.
    """
    settings = next((config[key] for key in _QUANTISED if config.get(key)), None)
    if not settings:
        return
    maker = settings.get("quant_method") if isinstance(settings, dict) else None
    maker = maker or ("MLX" if "quantization" in config else None)
    raise CheckpointError(
        f"{where} is quantised{f' by {maker}' if maker else ''}, says its config.json: its files hold codes, not "
        "weights that could be pruned. Name the full-precision model it was made from, and quantise what ssmc writes."
    )


def refuse_adapter(directory: Path, where: str) -> None:
    """Refuse a folder that holds an adapter and no model.

    Raises:
        CheckpointError: naming the model that the adapter belongs to.
    """
    if not any((directory / name).is_file() for name in _ADAPTERS):
        return
    settings = read_json(directory / _ADAPTER) if (directory / _ADAPTER).is_file() else {}
    base, kind = settings.get("base_model_name_or_path"), settings.get("peft_type")
    raise CheckpointError(
        f"{where} holds an adapter{f' ({kind})' if kind else ''}{f' of {base}' if base else ''}, not a model. Merge it "
        "into its model (peft: merge_and_unload, then save_pretrained) and name the folder with the result."
    )


def some_of(names: Any, most: int = 3) -> str:
    """The first few of some names, for a message."""
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more
