"""The whole of `ssmc compress`: read a model, prune it, write the artefact."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ssmc.runtime.checkpoints import Checkpoint, load_checkpoint
from ssmc.runtime.errors import UsageError
from ssmc.runtime.fast import use_fast_scan
from ssmc.runtime.files import refuse_existing
from ssmc.runtime.manifest import MANIFEST
from ssmc.runtime.progress import Progress, silent
from ssmc.runtime.text import read_texts
from ssmc.runtime.tiny import calibration_path
from ssmc.runtime.tokenizers import load_tokenizer, tokenizer_directory

from .artefact import write_artefact
from .calibration import Calibration, draw_samples
from .config import CompressConfig, Score, configure, kept_states
from .pipeline import LayerResult, prune_states

LARGEST_REPAIRABLE = 64  # states; the normal matrix has N^4 numbers


@dataclass(frozen=True)
class CompressResult:
    """What `compress` did."""

    directory: Path
    manifest: dict[str, Any]
    layers: tuple[LayerResult, ...]
    notes: tuple[str, ...]  # what the user should know about this choice


def compress(
    model: str | Path,
    *,
    out: str | Path = "ssmc-out",
    force: bool = False,
    progress: Progress = silent,
    command: str | None = None,
    **options: Any,
) -> CompressResult:
    """Prune a model in one shot and write it, masked, to a folder.

    Args:
        model: a transformers or mamba_ssm directory, a hub id, or "tiny".
        out: folder to write; it must not exist unless `force`.
        force: replace an earlier result of ssmc.
        progress: told what is being done.
        command: recorded in the manifest.
        options: fields of `CompressConfig`: pattern, sparsity, score, repair, calib, nsamples, seqlen, seed,
            round_to, tokenizer, device.

    Raises:
        SsmcError: with one sentence on what is wrong and what to do.
    """
    config = configure(model=str(model), **options)
    out = Path(out).expanduser()
    refuse_existing(out, force=force, marker=MANIFEST)  # before minutes of work, not after
    progress("reading the model", 0, 1)
    checkpoint = load_checkpoint(config.model, dtype=torch.float32)
    dense_states = checkpoint.dimensions.d_state
    keep = kept_states(dense_states, config.sparsity, config.round_to)
    _check_size(config, dense_states)
    tokenizer_source = tokenizer_directory(checkpoint, config.tokenizer)
    calibration = _calibration(config, checkpoint)
    device = _device(config.device)
    use_fast_scan(checkpoint.model.to(device))
    layers = prune_states(
        checkpoint.model,
        checkpoint.architecture,
        None if calibration is None else calibration.tokens.to(device),
        config,
        keep,
        checkpoint.dtypes,
        progress,
    )
    checkpoint.model.cpu()
    manifest = write_artefact(
        out, checkpoint, config, calibration, layers, tokenizer_source, command=command, force=force
    )
    return CompressResult(out, manifest, tuple(layers), tuple(_notes(config, calibration, dense_states, keep)))


def _calibration(config: CompressConfig, checkpoint: Checkpoint) -> Calibration | None:
    if not config.repair and config.score in (Score.magnitude, Score.random):
        return None
    tokenizer = load_tokenizer(checkpoint, config.tokenizer)
    texts = read_texts(calibration_path() if config.calib is None else config.calib)
    return draw_samples(texts, tokenizer, config.nsamples, config.seqlen, config.seed)


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda was asked for, but torch sees no CUDA device. Use --device cpu or auto.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _check_size(config: CompressConfig, d_state: int) -> None:
    if d_state > LARGEST_REPAIRABLE and (config.repair or config.score is Score.exact):
        raise UsageError(
            f"The repair and the score exact keep N^4 numbers a layer, too many for d_state {d_state} (at most "
            f"{LARGEST_REPAIRABLE}). Use --score energy --no-repair."
        )


def _notes(config: CompressConfig, calibration: Calibration | None, dense_states: int, keep: int) -> list[str]:
    notes = []
    if calibration and calibration.shortfall:
        notes.append(calibration.shortfall)
    if calibration and config.calib is None and config.model != "tiny":
        notes.append(
            "Calibrated on the embedded sample of simple stories. For a model of real text give text like what it "
            "will read: --calib wikitext2 or a file."
        )
    if keep & (keep - 1):
        padded = 1 << keep.bit_length()
        gain = "gains nothing there" if padded >= dense_states else f"costs as much as {padded} there"
        notes.append(
            f"{keep} states is not a power of two: the Triton decode kernels of mamba_ssm and vLLM pad it to {padded}, "
            f"so it {gain}; transformers, our CPU scan and mamba_ssm's prefill do gain. "
            "--round-to power-of-two avoids it."
        )
    return notes
