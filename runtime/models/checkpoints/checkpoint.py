"""A model in memory that remembers how it was stored, and how to read and write one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from ssmc.runtime.errors import CheckpointError, UsageError
from ssmc.runtime.models.checkpoints import codes_format, mamba_ssm_format, packed_format, transformers_format
from ssmc.runtime.models.checkpoints.deferred import Deferred, real
from ssmc.runtime.models.checkpoints.model import DTYPES, HEAD, build_model, check_finite, check_tensors, outline_model
from ssmc.runtime.models.checkpoints.names import model_names
from ssmc.runtime.models.checkpoints.reading import read_json, refuse_adapter, refuse_quantised
from ssmc.runtime.models.checkpoints.sources import about_files, find_directory
from ssmc.runtime.models.checkpoints.streamed import Streamed
from ssmc.runtime.models.checkpoints.transformers_format import write_config
from ssmc.runtime.models.checkpoints.writing import Shards
from ssmc.runtime.models.families import Architecture, Dimensions, architecture_for
from ssmc.runtime.progress import NO_PROGRESS, Progress

FORMATS = {module.NAME: module for module in (packed_format, transformers_format, mamba_ssm_format)}
"""The layouts of a model directory, by name; each module reads and writes one. The first to recognise it reads it."""


@dataclass
class Checkpoint:
    """A model in memory and how it was stored.

    Attributes:
        model: transformers' own model, in eval mode.
        architecture: what ssmc knows of its family.
        dtypes: stored dtype of every tensor by transformers' names, a tied head left out.
        format: of the directory it was read from: "transformers", "mamba-ssm", "sparse24-packed" or
            "compressed-tensors".
        source: as the user named it.
        directory: where it was read from.
        stored_config: the content of its config.json, in transformers' layout; None where it is in another one.
        notes: what was not as it should be in its files, and was read nevertheless, in sentences.
        streamed: where its tensors come from as they are wanted; None where all of them are in memory.
    """

    model: PreTrainedModel
    architecture: Architecture
    dtypes: dict[str, torch.dtype]
    format: str
    source: str
    directory: Path
    stored_config: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()
    streamed: Streamed | None = None

    @property
    def config(self) -> PretrainedConfig:
        """transformers' configuration of the model."""
        return self.model.config

    @property
    def dimensions(self) -> Dimensions:
        """The sizes of the model."""
        return self.architecture.dimensions(self.config)

    @property
    def parameters(self) -> int:
        """How many numbers the model has."""
        return parameter_count(self.tensors())

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors as they are now, by transformers' names, in their stored dtypes, on the CPU; no tied head.

        Where the dtype in memory is the stored one these are the model's own tensors, not copies. Those of a model that
        is not in memory are deferred, see `deferred`.
        """
        if self.streamed is not None:
            return dict(self.streamed.tensors)
        state = self.model.state_dict()
        return {name: state[name].detach().to("cpu", dtype).contiguous() for name, dtype in self.dtypes.items()}

    def holding(self, module: nn.Module) -> AbstractContextManager[nn.Module]:
        """A block of the model has its weights in memory, whether they are streamed or not."""
        return nullcontext(module) if self.streamed is None else self.streamed.holding(module)

    def read(self) -> None:
        """Have all of a model in memory that was opened only."""
        if self.streamed is not None:
            self.streamed.read()
            self.model.tie_weights()
            self.streamed = None


def load_checkpoint(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    lazy: bool = False,
    codes: bool = False,
    progress: Progress = NO_PROGRESS,
) -> Checkpoint:
    """Read a model, with every tensor accounted for; nothing in its files is ever executed.

    Args:
        source: a directory in transformers' or mamba_ssm's layout, a hub id, or "tiny".
        dtype: of the weights in memory: float32, float16 or bfloat16; None keeps what is stored, tensor by tensor.
        lazy: leave the weights in their files; the parts of the model get them, in float32, while they run, see
            `Streamed`. A family whose layers share blocks is read as a whole.
        codes: take a model whose files hold codes in the place of weights as well, to run it with the numbers they
            stand for; what is to be pruned should come from the model it was made from.
        progress: told about every file of weights.

    Raises:
        CheckpointError: there is no such model, it is not one ssmc knows, or its files are damaged: a tensor missing,
            unknown, misshapen, of another dtype or not finite.
        UsageError: `dtype` is none of the three.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"{dtype} is no dtype to compute in. Use float32, float16 or bfloat16.")
    directory = find_directory(source)
    layout, config, raw = _read_config(directory, str(source), codes)
    architecture = architecture_for(config.model_type, str(source))
    lazy = lazy and not architecture.capabilities.shared_blocks
    named, note = model_names(layout.read(directory, progress, lazy), architecture, config)
    tensors = check_tensors(named, config, str(source))
    config.dtype = transformers_format.main_dtype(tensors)
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    streamed = None
    if lazy:
        model = outline_model(config, str(source))
        streamed = Streamed(model, architecture.blocks(model), tensors)
    else:
        model = build_model(config, tensors, dtype, str(source))
    notes = [note for note in (note, _read_generation_config(model, directory)) if note]
    stored_config = layout.words_of(raw)
    return Checkpoint(
        model, architecture, dtypes, layout.NAME, str(source), directory, stored_config, tuple(notes), streamed
    )


def read_dimensions(directory: Path) -> Dimensions:
    """The sizes of a model from its config.json alone.

    Raises:
        CheckpointError: there is none, or it describes no model ssmc knows.
    """
    architecture, config = read_description(directory, str(directory))
    return architecture.dimensions(config)


def read_description(directory: Path, where: str) -> tuple[Architecture, PretrainedConfig]:
    """The family and the configuration of a model from its config.json alone.

    Args:
        directory: of the model.
        where: what the user calls it.

    Raises:
        CheckpointError: there is none, or it describes no model ssmc knows.
    """
    _, config, _ = _read_config(directory, where)
    return architecture_for(config.model_type, where), config


def write_checkpoint(
    directory: Path,
    tensors: Mapping[str, torch.Tensor],
    config: PretrainedConfig,
    *,
    format: str = transformers_format.NAME,
    max_shard_size: int | str = "5GB",
    like: Checkpoint | None = None,
) -> list[Path]:
    """Write a model into an existing directory; same input, same bytes, wherever the directory is.

    Args:
        directory: exists; `runtime.files.new_directory` makes one that appears only when complete.
        tensors: by transformers' names, in the dtypes to store; a tied head is not needed.
        config: transformers' configuration of the model.
        format: "transformers" (config.json and safetensors), "mamba-ssm" (config.json and pytorch_model.bin) or
            "sparse24-packed" (2:4 matrices in 9/16 of their space, which only ssmc reads).
        max_shard_size: bytes of a safetensors file, or like "5GB"; mamba_ssm reads single files only.
        like: the model it was made from, whose config.json is taken over key by key but for the sizes that differ.

    Returns:
        The files written.

    Raises:
        CheckpointError: tensors and configuration do not fit, a number is not finite, or the format has no such model.
        OSError: the system refuses; `new_directory` turns it into a sentence.
    """
    if format not in FORMATS:
        raise UsageError(f"There is no checkpoint format {format!r}; there are {', '.join(FORMATS)}.")
    checked = check_tensors(tensors, config, "the model to write")
    stored = architecture_for(config.model_type).to_stored(checked)
    try:
        words, layout = None if like is None else like.stored_config, FORMATS[format]
        own = {k: _own(v if layout is transformers_format else real(v)) for k, v in stored.items()}
        return layout.write(directory, own, config, max_shard_size, words)
    except (SafetensorError, RuntimeError) as error:
        raise _system_error(error) from error


class Written:
    """A model like another one, of the same shapes and types, on its way to a folder in transformers' layout.

    Args:
        like: what it is made from.
        directory: exists.
        again: whether its files are there already, from a run that was cut off.
        max_shard_size: as for `write_checkpoint`.
    """

    def __init__(self, like: Checkpoint, directory: Path, again: bool = False, max_shard_size: int | str = "5GB"):
        self._like, self._directory, self._stored = like, directory, like.architecture.to_stored
        self._outlines = like.tensors()
        self.shards = Shards(directory, self._stored(self._outlines), max_shard_size, again)

    def put(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write some of the tensors, by transformers' names.

        Raises:
            CheckpointError: a number in them is not finite.
            OSError: the system refuses.
        """
        for name, tensor in tensors.items():
            own = real(tensor)
            check_finite(name, own, "the model to write")
            self.shards.put(self._stored({name: own}))

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Tensors that were put, by transformers' names."""
        stored = self._stored({name: self._outlines[name] for name in names})
        return self._like.architecture.from_stored({name: self.shards.read(name) for name in stored})

    def close(self) -> list[Path]:
        """Write the configuration; all files."""
        like = self._like
        path = self._directory / "config.json"
        return [write_config(path, self._outlines, like.config, like.stored_config), *self.shards.close()]


def parameter_count(tensors: Mapping[str, torch.Tensor]) -> int:
    """How many numbers a model has, a tied head counted once."""
    return sum(tensor.numel() for name, tensor in tensors.items() if not _is_tied_head(name, tensor, tensors))


def tensor_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """How many bytes the numbers of a model take, as they are stored."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _read_config(directory: Path, where: str, codes: bool = False) -> tuple[Any, PretrainedConfig, dict[str, Any]]:
    path = directory / "config.json"
    if not path.is_file():
        refuse_adapter(directory, where)
        raise CheckpointError(f"{where} holds no config.json, so it is not a model. {about_files(directory)}")
    raw = read_json(path)
    if codes and codes_format.recognises(raw):
        return codes_format, codes_format.read_config(raw, path), raw
    refuse_quantised(raw, where)
    for layout in FORMATS.values():
        if layout.recognises(raw):
            if "model_type" in raw:
                architecture_for(str(raw["model_type"]), where)
            return layout, layout.read_config(raw, path), raw
    raise CheckpointError(
        f"{path} has neither model_type (transformers) nor d_model (mamba_ssm), so it does not describe a model ssmc "
        "knows. Copy the model's own config.json."
    )


def _are_tokens(value: Any) -> bool:
    """Whether a value is a token or some, or none."""
    return value is None or all(isinstance(token, int) for token in (value if isinstance(value, list) else [value]))


def _read_generation_config(model: PreTrainedModel, directory: Path) -> str | None:
    """How the model wants to generate, as transformers' own loading does.

    Returns:
        What of it this version of transformers does not take, in a sentence; older ones had other values.
    """
    path = directory / "generation_config.json"
    if not path.is_file():
        return None
    taken, left = {}, []
    for key, value in read_json(path).items():
        try:
            if key.endswith("_token_id") and not _are_tokens(value):
                raise TypeError(key)
            GenerationConfig(**taken, **{key: value})
        except Exception:  # whatever its checks raise
            left.append(key)
        else:
            taken[key] = value
    model.generation_config = GenerationConfig(**taken)
    if not left:
        return None
    return f"{path.name} has {', '.join(left)} with a value that this version of transformers does not know; left out."


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with no storage but its own: torch.save would write all of a bigger one."""
    tensor = tensor.detach().cpu().contiguous()
    if isinstance(tensor, Deferred):
        return tensor
    nbytes = tensor.numel() * tensor.element_size()
    return tensor if tensor.untyped_storage().nbytes() == nbytes else tensor.clone()


def _is_tied_head(name: str, tensor: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> bool:
    if isinstance(tensor, Deferred):  # a tied head was left out
        return False
    return name == HEAD and any(other.data_ptr() == tensor.data_ptr() for key, other in tensors.items() if key != HEAD)


def _system_error(error: Exception) -> Exception:
    """The operating system's error behind one of a library that wrote a file, or the error itself."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause
        cause = cause.__context__
    if number := re.search(r"os error (\d+)", str(error)):  # safetensors is written in Rust
        return OSError(int(number[1]), str(error))
    return error
