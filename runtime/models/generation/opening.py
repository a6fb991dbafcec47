"""What a user means by MODEL, opened as a session."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ssmc.runtime.device import choose_device, choose_dtype
from ssmc.runtime.errors import CheckpointError, UsageError
from ssmc.runtime.manifest import EXPORTS, MANIFEST, MaskedManifest, read_manifest
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.checkpoints.reading import read_json
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.models.generation.onnx_graph import is_onnx_export, open_graph
from ssmc.runtime.models.generation.onnx_session import OnnxSession
from ssmc.runtime.models.generation.session import Session
from ssmc.runtime.models.generation.torch_session import TorchSession
from ssmc.runtime.models.llama_cpp import check_llama_cpp, is_gguf_export, load_gguf_export
from ssmc.runtime.models.tokenizers import check_fits, has_tokenizer, load_tokenizer, tokenizer_directory
from ssmc.runtime.progress import NO_PROGRESS, Progress
from ssmc.runtime.scan.rounding import state_format

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"


@dataclass(frozen=True)
class LoadedSession:
    """A session and what belongs to it.

    Attributes:
        session: computes.
        tokenizer: transformers' tokenizer; None where the model comes without one.
        stop_tokens: ids that end a text.
        where: the folder or name that was opened.
    """

    session: Session
    tokenizer: Any
    stop_tokens: tuple[int, ...]
    where: str


def open_session(
    source: str | Path,
    *,
    tokenizer: str | None = None,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    state_dtype: str | None = None,
    progress: Progress = NO_PROGRESS,
) -> LoadedSession:
    """Read a model and start a session of it.

    Args:
        source: a model folder, a hub id, "tiny" or the folder of an ONNX export; or what `compress` wrote, of which the
            export for torch is taken if there is one.
        tokenizer: directory or hub id, where the model carries none.
        device: "cpu", "cuda" or "auto".
        dtype: of weights and activations; by default float32 on a CPU and the stored one on a GPU. An ONNX export has
            its own.
        backend: of the selective scan in torch, see `use_fast_scan`.
        state_dtype: how SSM states are kept between calls, "float32" (the default), "float16" or "int8", see
            `use_fast_scan`. An ONNX export has its own.
        progress: told about every file of weights.

    Raises:
        SsmcError: with one sentence on what is wrong and what to do.
    """
    state_format(state_dtype or "float32")
    source = _inside_artefact(source)
    if state_dtype is not None and (is_onnx_export(source) or is_gguf_export(source)):
        raise UsageError(
            f"How {source} keeps its states was chosen when it was exported: leave out --state-dtype, or export again "
            "(--format onnx --state-dtype int8)."
        )
    if is_onnx_export(source):
        return _open_onnx(Path(source).expanduser(), tokenizer, device, dtype, progress)
    if is_gguf_export(source):
        return _open_gguf(Path(source).expanduser(), tokenizer, device, dtype)
    where = choose_device(device)
    checkpoint = load_checkpoint(source, dtype=choose_dtype(dtype, where), codes=True, progress=progress)
    model = use_fast_scan(checkpoint.model.to(where), backend, state_dtype or "float32")
    found = None
    if tokenizer is not None or tokenizer_directory(checkpoint) is not None:
        found = load_tokenizer(checkpoint, tokenizer)
    stops = _stop_tokens(found, getattr(model, "generation_config", None), model.config)
    return LoadedSession(TorchSession(model), found, stops, str(source))


def _open_onnx(
    folder: Path, tokenizer: str | None, device: str, dtype: torch.dtype | None, progress: Progress
) -> LoadedSession:
    if dtype is not None:
        raise UsageError(f"The dtype of {folder} was chosen when it was exported: leave out --dtype, or export again.")
    return _loaded(OnnxSession(open_graph(folder, device, progress=progress)), folder, tokenizer)


def _open_gguf(folder: Path, tokenizer: str | None, device: str, dtype: torch.dtype | None) -> LoadedSession:
    if dtype is not None:
        raise UsageError(f"The dtype of {folder} was chosen when it was exported: leave out --dtype, or export again.")
    check_llama_cpp("cpu" if device == "auto" else device)
    return _loaded(load_gguf_export(folder).model, folder, tokenizer)


def _loaded(session: Session, folder: Path, tokenizer: str | None) -> LoadedSession:
    """A session of an export with what lies beside it: the tokenizer, and which tokens end a text."""
    beside = [folder / name for name in (GENERATION_CONFIG, CONFIG)]
    configs = [SimpleNamespace(**read_json(path)) for path in beside if path.is_file()]
    found = None
    if tokenizer is not None or has_tokenizer(folder):
        found = load_tokenizer(folder, tokenizer)
        check_fits(found, session.vocab_size, str(tokenizer or folder), str(folder))
    return LoadedSession(session, found, _stop_tokens(found, *configs), str(folder))


def warm_up(session: Session) -> None:
    """Read a few tokens and forget them, so that later calls are not the ones that compile and allocate."""
    session.reset()
    session.prefill([[0, 0]])
    session.step([0])
    session.reset()


def require_tokenizer(loaded: LoadedSession) -> Any:
    """The tokenizer of a session.

    Raises:
        CheckpointError: there is none.
    """
    if loaded.tokenizer is None:
        raise CheckpointError(
            f"{loaded.where} comes without a tokenizer. Name one with --tokenizer: a folder, a tokenizer.json file or "
            "a hub id."
        )
    return loaded.tokenizer


def _inside_artefact(source: str | Path) -> str | Path:
    """The export in the folder that `compress` wrote, or what was named."""
    folder = Path(source).expanduser() if str(source) else Path(".")
    if str(source) and (folder / MANIFEST).is_file() and isinstance(read_manifest(folder), MaskedManifest):
        exports = [folder / name for name in EXPORTS["torch"] if (folder / name / MANIFEST).is_file()]
        return exports[0] if exports else source
    return source


def _stop_tokens(tokenizer: Any, *configs: Any) -> tuple[int, ...]:
    """End-of-text ids, as the tokenizer or the model's configurations name them."""
    named: list[int] = []
    for holder in (tokenizer, *configs):
        ids = getattr(holder, "eos_token_id", None)
        named += ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids]
    return tuple(dict.fromkeys(named))
