"""What belongs to a model beside its configuration and its weights: it comes along unchanged wherever the model goes.

generation_config.json, chat templates, processor files, licence, README: pruning changes none of them, and a model that
loses its ends of turn or its template answers differently.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from ssmc.runtime.manifest import MANIFEST
from ssmc.runtime.models.tokenizers import FILES as TOKENIZER_FILES
from ssmc.runtime.models.tokenizers import copy_tokenizer
from ssmc.runtime.quantized import FILE as CODES

FOLDERS = ("additional_chat_templates",)
README, OTHER_README = "README.md", "README-model.md"  # the latter where a format has a README of its own
_OURS = (MANIFEST, "recipe.yaml", "config.json", "__init__.py", CODES)
# Weights of any software, what training leaves behind, and data: each is no part of a smaller model.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".gguf", ".onnx", ".data", ".npz")
_DATA = (
    ".npy",
    ".pkl",
    ".pickle",
    ".mlmodel",
    ".tflite",
    ".parquet",
    ".arrow",
    ".jsonl",
    ".csv",
    ".log",
    ".lock",
    ".tmp",
)
_PACKED = (".zip", ".tar", ".gz", ".zst", ".xz", ".bz2")
_NOT_COPIED = {*_WEIGHTS, *_DATA, *_PACKED}
_INDEX = ".index.json"  # names the shards of weights


def copy_companions(source: Path, tokenizer: Path | None, target: Path) -> list[Path]:
    """Copy a model's tokenizer and everything else that is neither its configuration nor its weights.

    Args:
        source: the folder of the model.
        tokenizer: where its tokenizer is, a folder or a tokenizer.json file; None where there is none.
        target: an existing folder; what it holds already stays as it is.

    Returns:
        The files written.
    """
    written = [] if tokenizer is None else copy_tokenizer(tokenizer, target)
    aside = TOKENIZER_FILES if tokenizer not in (None, source) else ()  # one tokenizer is not mixed with another
    inside = [file for name in FOLDERS if (source / name).is_dir() for file in (source / name).iterdir()]
    for file in sorted([*source.iterdir(), *inside]):
        place = target / file.relative_to(source)
        if place.name == README and place.exists():
            place = place.with_name(OTHER_README)
        if _belongs(file) and file.name not in aside and not place.exists():
            place.parent.mkdir(exist_ok=True)
            written.append(Path(shutil.copyfile(file, place)))
    return written


def _belongs(file: Path) -> bool:
    """Whether a file describes a model, other than by sizes or numbers."""
    name = file.name.lower()
    if not file.is_file() or name.startswith(".") or name in _OURS:
        return False
    return file.suffix.lower() not in _NOT_COPIED and not name.endswith(_INDEX)
