"""Read JSON and tensors from files nobody has vouched for: nothing in them is ever executed.

Weights come from safetensors, or from PyTorch's .bin through `torch.load(weights_only=True)`, which builds tensors and
plain containers and refuses everything else a pickle could do.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ssmc.runtime.errors import CheckpointError
from ssmc.runtime.progress import NO_PROGRESS, Progress

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
HEAD = "lm_head.weight"
_ADAPTER = "adapter_config.json"  # of peft
_QUANTISED = ("quantization_config", "compression_config", "quantization")  # in config.json; the last is MLX's

_EXPLAINED = (SafetensorError, RuntimeError)  # errors whose text means something to a reader


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _unreadable(path, error) from error
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
    directory: Path, progress: Progress = NO_PROGRESS, files: Sequence[str] = SINGLE_FILES
) -> dict[str, torch.Tensor]:
    """Read all tensors of a model directory, from one file or from shards with an index.

    safetensors is preferred to .bin, and a single file to shards, as transformers does. Tensors of safetensors files
    are mapped, not copied, so the files must not be overwritten in place while they are in use.

    Args:
        directory: holds model.safetensors, pytorch_model.bin, or either of their names plus `.index.json`.
        progress: told about every file.
        files: other names to look for than these two.

    Returns:
        Tensors on the CPU by name, of whatever dtype is stored.

    Raises:
        CheckpointError: there are no weights, or a file is damaged, missing, or holds more than tensors.
    """
    for single in files:
        index = directory / f"{single}.index.json"
        if os.path.lexists(directory / single):
            return _read_shards([directory / single], progress)
        if os.path.lexists(index):
            return _read_indexed(index, Path(single).suffix, progress)
    if (directory / "model.onnx").is_file():
        raise CheckpointError(
            f"{directory} is an export to ONNX, which torch cannot read: `ssmc generate`, `ssmc eval` "
            "and `ssmc bench` take it. Name the model it was made from."
        )
    raise CheckpointError(
        f"{directory} holds no weights: none of {', '.join(files)} or their .index.json is in it. "
        "Download or copy the model again."
    )


def _read_indexed(index: Path, suffix: str, progress: Progress) -> dict[str, torch.Tensor]:
    """Read the shards an index names; both must agree on which tensors there are."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f'{index} has no "weight_map" that gives every tensor its file. Copy it again.')
    names = sorted(set(weight_map.values()))
    for name in names:
        # an index must not reach outside its folder, nor bring in another kind of file
        if Path(name).name != name or "\\" in name or Path(name).suffix != suffix:
            raise CheckpointError(f"{index} names {name!r}, which is not a {suffix} file beside it. Copy it again.")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.parent / name} is missing, though {index.name} names it. Copy it again.")
    tensors = _read_shards([index.parent / name for name in names], progress)
    for what, missing in (
        # whether a head is missing is for whoever knows the configuration to say: it may be the embedding
        ("the index names but no shard holds", weight_map.keys() - tensors.keys() - {HEAD}),
        ("a shard holds but the index does not name", tensors.keys() - weight_map.keys() - {HEAD}),
    ):
        if missing:
            raise CheckpointError(f"{index} and its shards disagree: {what} {some_of(missing)}. Copy the model again.")
    return tensors


def _read_shards(paths: list[Path], progress: Progress) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for done, path in enumerate(paths):
        progress("reading the weights", done, len(paths))
        if not path.is_file():
            raise CheckpointError(f"{path} is not a file. Copy the model again.")
        if path.stat().st_size == 0:
            raise CheckpointError(f"{path} is empty. Copy the model again.")
        shard = _read_safetensors(path) if path.suffix == ".safetensors" else _read_bin(path)
        if twice := tensors.keys() & shard.keys():
            raise CheckpointError(
                f"{path} holds {some_of(twice)}, which another shard holds too. Copy the model again."
            )
        tensors |= shard
    progress("reading the weights", len(paths), len(paths))
    return tensors


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: _aligned(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise _unreadable(path, error) from error
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise _damaged(path, error) from error


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy if a file of mixed dtypes put the tensor where compiled kernels could not read it."""
    return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor


def _read_bin(path: Path) -> dict[str, torch.Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols and old storage classes
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        if error.errno == errno.EINVAL:  # torch seeks to before the start of a file that is too short
            raise _damaged(path, error) from error
        raise _unreadable(path, error) from error
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
    if not (directory / _ADAPTER).is_file():
        return
    settings = read_json(directory / _ADAPTER)
    base, kind = settings.get("base_model_name_or_path"), settings.get("peft_type")
    raise CheckpointError(
        f"{where} holds {f'a {kind}' if kind else 'an'} adapter{f' of {base}' if base else ''}, not a model. Merge it "
        "into its model (peft: merge_and_unload, then save_pretrained) and name the folder with the result."
    )


def some_of(names: Any, most: int = 3) -> str:
    """The first few of some names, for a message."""
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read: {error.strerror or error}. Check that it is there and readable.")


def _damaged(path: Path, error: Exception) -> CheckpointError:
    reason = str(error).strip().split("\n")[0].split(". ")[0].rstrip(".") if isinstance(error, _EXPLAINED) else ""
    return CheckpointError(
        f"{path} is damaged or incomplete{f' ({reason})' if reason else ''}. Copy or download it again."
    )
