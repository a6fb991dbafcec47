"""One file in llama.cpp's format, through the package gguf: keys, vocabulary, tensors, quantised where that pays."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from ssmc.exporters.gguf.codes import CODES, blocks
from ssmc.exporters.gguf.parts import Entry
from ssmc.exporters.gguf.vocabulary import Vocabulary
from ssmc.runtime.errors import CheckpointError
from ssmc.runtime.models.checkpoints.deferred import real

FILE = "model.gguf"
TYPES = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q5_1": gguf.GGMLQuantizationType.Q5_1,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
}
FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q5_1": gguf.LlamaFileType.MOSTLY_Q5_1,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    CODES: gguf.LlamaFileType.MOSTLY_Q4_0,
}
BLOCK = 32  # numbers that share a scale in the quantised types: a row that is no multiple stays float16


def write_file(
    path: Path,
    architecture: str,
    keys: Mapping[str, Any],
    entries: Iterable[tuple[Entry, torch.Tensor | None]],
    vocabulary: Vocabulary,
    quantize: str,
) -> Path:
    """Write a file; same input, same bytes.

    Args:
        path: of the file.
        architecture: llama.cpp's name.
        keys: sizes and constants without the architecture before each; those that begin with "general." as they are.
        entries: its tensors, and the scale of every number of those that are codes; deferred ones are read, and all
            are converted, one after the other.
        vocabulary: of its tokenizer.
        quantize: of large matrices, one of `TYPES`.
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_file_type(FILE_TYPES[quantize])
    if quantize.startswith("q") or quantize == CODES:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in keys.items():
        _add(writer, key if key.startswith("general.") else f"{architecture}.{key}", value)
    _add_vocabulary(writer, vocabulary)
    entries, codes = list(entries), {}
    for entry, scale in entries:  # what the file holds is said before the first of it
        packed = None if scale is None else blocks(real(entry.tensor), scale)
        if packed is not None:
            codes[entry.name] = packed[1]
        kind = TYPES[type_of(entry, quantize)] if packed is None else packed[0]
        shape = tuple(entry.tensor.shape)
        stored = gguf.quant_shape_to_byte_shape(shape, kind)
        plain = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16}.get(kind)
        bytes_of = math.prod(shape) * np.dtype(plain).itemsize if plain else math.prod(stored)
        writer.add_tensor_info(entry.name, shape if plain else stored, np.dtype(plain or np.uint8), bytes_of, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry, _ in entries:
        if entry.name in codes:
            writer.write_tensor_data(codes[entry.name])
            continue
        data = np.ascontiguousarray(real(entry.tensor).detach().to("cpu", torch.float32).numpy())
        writer.write_tensor_data(gguf.quantize(data, TYPES[type_of(entry, quantize)]))
    writer.close()
    return path


def type_of(entry: Entry, quantize: str) -> str:
    """How a tensor is stored: only large matrices whose rows are whole blocks are quantised."""
    if not entry.large:
        return "f32"
    if quantize == CODES:  # what is none stays as it is
        return {torch.float16: "f16", torch.bfloat16: "bf16"}.get(entry.tensor.dtype, "f32")
    return "f16" if quantize.startswith("q") and entry.tensor.shape[-1] % BLOCK else quantize


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a file in float32, by name; errors as `open_tensors`."""
    return {name: read() for name, read in open_tensors(path).items()}


def open_tensors(path: Path) -> dict[str, Callable[[], np.ndarray]]:
    """What reads a tensor of a file, in float32, by name; it raises the same.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        return {tensor.name: partial(_read, path, tensor) for tensor in gguf.GGUFReader(path).tensors}
    except Exception as error:  # gguf, numpy and struct raise many kinds on damaged bytes
        raise _damaged(path, error) from error


def _read(path: Path, tensor: gguf.ReaderTensor) -> np.ndarray:
    stored = tensor.data  # mapped; what is read of it would stay resident
    try:
        data = np.fromfile(path, stored.dtype, stored.size, offset=int(tensor.data_offset)).reshape(stored.shape)
        return gguf.dequantize(data, tensor.tensor_type).astype(np.float32, copy=False)
    except Exception as error:  # as above
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} is a damaged GGUF file ({error}). Export the model again.")


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """One key, with the type that llama.cpp expects of such values."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, list(value))


def _add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.kinds))
    writer.add_token_merges(list(vocabulary.merges))
    for key, value in vocabulary.numbers.items():
        _add(writer, f"tokenizer.ggml.{key}", value)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)
