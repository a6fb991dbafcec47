"""Find the directory a model lies in: the embedded one, a local one, or one of the Hugging Face hub."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ssmc.runtime.errors import CheckpointError, UsageError
from ssmc.runtime.tiny import TINY_DIRECTORY
from ssmc.runtime.tiny2 import TINY2_DIRECTORY
from ssmc.runtime.tiny_hybrid import TINY_HYBRID_DIRECTORY

TINY = "tiny"
EMBEDDED = {TINY: TINY_DIRECTORY, "tiny-mamba2": TINY2_DIRECTORY, "tiny-hybrid": TINY_HYBRID_DIRECTORY}
"""The models that come with ssmc, by name; all have the tokenizer and the texts of `tiny`."""

_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?", re.ASCII)
_SAFETENSORS, _BIN = "model.safetensors", "pytorch_model.bin"
PACKED_FILE = "model.sparse24-packed.safetensors"
"""Weights in ssmc's own layout, see `packed_format`."""
_DESCRIPTIONS: tuple[str, ...] = (
    "config.json",
    "generation_config.json",
    "*.index.json",
    "tokenizer*",
    "special_tokens_map.json",
)
_DESCRIPTIONS += ("added_tokens.json", "vocab.*", "merges.txt", "spiece.model", "chat_template.jinja")
# What goes wherever the model goes: templates, processors, licence, README, and code, which is not run here and which
# a configuration may name for releases of transformers without the family; see runtime/models/companions.py.
_COMPANIONS = ("*.json", "*.jinja", "*.md", "*.txt", "*.model", "*.py", "LICEN[CS]E*", "NOTICE*", "USE_POLICY*")


_NAME_THE_FOLDER = "Name the folder that holds the model's config.json and weights."
_ABOUT_FILES = {
    ".gguf": "GGUF is what llama.cpp runs, quantised or not: name the checkpoint it was made from.",
    ".onnx": "Name the folder of the export that holds it, or the model it was made from.",
} | dict.fromkeys(
    (".pt", ".pth", ".ckpt"),
    "Weights without a config.json can be those of any module: load them into it, and give it to "
    "ssmc.compress(module, batches) in Python.",
)
"""What to do with a file that is no folder, by its suffix."""


def about_files(directory: Path) -> str:
    """What to do with a folder that holds weights which are no checkpoint, or what folder to name."""
    suffixes = {path.suffix for path in directory.iterdir()}
    return next((told for suffix, told in _ABOUT_FILES.items() if suffix in suffixes), _NAME_THE_FOLDER)


def find_directory(source: str | Path) -> Path:
    """The directory of a model, downloaded first if it is a hub id.

    Args:
        source: "tiny", "tiny-mamba2" or "tiny-hybrid" for an embedded model (a folder of that name is "./tiny"), a
            directory, or `owner/name` on the hub, or `owner/name@revision` for a branch, a tag or a commit of it. What
            exists here, starts with `.`, `/` or `~` or is not of that form never goes to the hub.

    Raises:
        CheckpointError: there is no such directory, or it cannot be downloaded.
    """
    local = check_source(source)
    return download(str(source)) if local is None else local


def check_source(source: str | Path) -> Path | None:
    """Whether there can be a model, without reading or downloading anything; `find_directory` without the network.

    Returns:
        Its directory, or None where it is a hub id.

    Raises:
        CheckpointError: there is no such directory.
    """
    if source in EMBEDDED:
        return EMBEDDED[source]
    try:
        path = Path(source).expanduser()
        if path.is_dir() and source != "":  # which Path takes for the current folder
            return path
        is_file = path.is_file()
    except (OSError, RuntimeError) as error:  # the latter for the home of a user who is not there
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{source} cannot be read: {reason}. Check the path.") from error
    if is_file:
        raise CheckpointError(f"{source} is a file. {_ABOUT_FILES.get(path.suffix, _NAME_THE_FOLDER)}")
    if isinstance(source, str) and is_hub_id(source):
        return None
    raise CheckpointError(
        f"There is no model at {str(source)!r}. Name a folder with config.json and weights, a model of the Hugging "
        f"Face hub as owner/name, or an embedded model: {', '.join(EMBEDDED)}."
    )


def is_hub_id(source: str) -> bool:
    """Whether `source` has the form owner/name, or owner/name@revision."""
    return _HUB_ID.fullmatch(source) is not None


def at_revision(source: str, revision: str | None) -> str:
    """A model of the hub at a branch, a tag or a commit, as one name; without a revision as it is.

    Raises:
        UsageError: the model is not of the hub, or names a revision already.
    """
    if revision is None:
        return source
    if not source:
        raise UsageError(
            f"A revision ({revision}) goes with a model of the hub, and none is named; at bench and eval it is that of "
            "--dense. Name the model as owner/name."
        )
    match = _HUB_ID.fullmatch(source)
    named = f"{source}@{revision}"
    if check_source(source) is not None or not match or match[2] or not _HUB_ID.fullmatch(named):
        raise UsageError(
            f"A revision ({revision}) goes with a model of the hub, owner/name, and {source!r} is none, or names one "
            "already. Leave --revision out."
        )
    return named


def download(hub_id: str) -> Path:
    """Bring a model of the hub into the hub's cache: what describes it, and one set of weights.

    Of the weights that may lie there those are fetched that `reading.read_tensors` takes: model.safetensors, else its
    shards, else the same of pytorch_model.bin.

    Raises:
        CheckpointError: there is no network, no such model or no such revision.
    """
    described = [*_DESCRIPTIONS, *_COMPANIONS]
    folder = _snapshot(hub_id, [*described, _SAFETENSORS, PACKED_FILE])
    if (folder / _SAFETENSORS).exists() or (folder / PACKED_FILE).exists():
        return folder
    for weights in (_SAFETENSORS, _BIN):
        index = folder / f"{weights}.index.json"
        if index.is_file():
            return _snapshot(hub_id, [*described, *_shards(index)])
    return _snapshot(hub_id, [*described, _BIN])


def _shards(index: Path) -> list[str]:
    """The files that an index names; one that is damaged is judged when it is read."""
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return sorted({name for name in named if re.fullmatch(r"[\w.-]+", name)})
    except (AttributeError, KeyError, OSError, TypeError, ValueError):
        return []


def download_tokenizer(hub_id: str) -> Path:
    """Bring only the tokenizer of a model of the hub into the hub's cache.

    Raises:
        CheckpointError: there is no network, or no such model.
    """
    return _snapshot(hub_id, list(_DESCRIPTIONS))


def download_configuration(hub_id: str) -> Path:
    """Bring only the configuration of a model of the hub into the hub's cache.

    Raises:
        CheckpointError: there is no network, or no such model.
    """
    return _snapshot(hub_id, ["config.json"])


def hub_headers(hub_id: str) -> dict[str, tuple[list[int], str]]:
    """Shape and type of every tensor of a model of the hub by its stored name; its weights stay there.

    Raises:
        Exception: of the hub's client; there are no safetensors files, or no network.
    """
    from huggingface_hub import HfApi

    name, revision = _HUB_ID.fullmatch(hub_id).groups()
    files = HfApi(library_name="ssmc").get_safetensors_metadata(name, revision=revision).files_metadata.values()
    return {name: (info.shape, info.dtype) for file in files for name, info in file.tensors.items()}


def _snapshot(hub_id: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    what = f"There is no folder {hub_id!r} here, and it"
    name, revision = _HUB_ID.fullmatch(hub_id).groups()
    try:
        # only files at the top: other folders of a repository hold other formats of the model
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except GatedRepoError as error:
        raise CheckpointError(
            f"{what} is a closed model of the hub: ask for access there, then `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"The model {name} of the hub has no revision {revision!r}. Name a branch, a tag or a commit of it."
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"{what} is no model of the hub that you may read. Check the name.") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{what} could not be fetched from the Hugging Face hub: no connection. Download it where there is a "
            "network and name the folder."
        ) from error
    except Exception as error:  # httpx's, the file system's and the hub's own errors
        reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
        raise CheckpointError(
            f"{what} could not be fetched from the Hugging Face hub ({reason}). Download it otherwise and name "
            "the folder."
        ) from error
