"""`ssmc.json`: the file that says what an artefact is, how it was made, and from what.

A manifest carries no date, duration or machine: the same run gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ssmc.runtime.errors import CheckpointError, UsageError
from ssmc.runtime.files import sha256

MANIFEST = "ssmc.json"
SCHEMA = 1
EXPORTS = {"torch": ("safetensors", "mamba-ssm", "sparse24"), "onnx": ("onnx",)}
"""Runtime -> folders of an artefact that hold exports for it, the first choice first."""

RUNTIMES = tuple(EXPORTS)
EVERYWHERE = ("kind", "source")  # what every manifest says, of an artefact or of an export


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """Write `manifest` into `directory`, which is not yet visible to anybody else."""
    text = json.dumps({"schema": SCHEMA, **manifest}, indent=1, ensure_ascii=False)
    (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")


def file_records(files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of files by name, for a manifest."""
    return {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in sorted(files)}


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read the manifest of an artefact.

    Args:
        directory: what `compress` or `export` wrote.

    Raises:
        UsageError: `directory` is not an artefact of ssmc.
        CheckpointError: the manifest is damaged or of a version this ssmc does not know.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise UsageError(
            f"{directory} holds no compressed model (no {MANIFEST} in it). Run `ssmc compress MODEL` first, or name "
            "the folder it wrote to."
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}). Run `ssmc compress` again.") from error
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        found = manifest.get("schema") if isinstance(manifest, dict) else None
        raise CheckpointError(
            f"{path} has schema {found!r}, this ssmc reads {SCHEMA}. Compress again with this version."
        )
    require_keys(manifest, EVERYWHERE, directory)
    return manifest


def require_keys(manifest: Mapping[str, Any], keys: Iterable[str], directory: Path) -> None:
    """Check that a manifest says what is going to be read.

    Raises:
        CheckpointError: it lacks something.
    """
    missing = [key for key in keys if key not in manifest]
    if missing:
        raise CheckpointError(
            f"{directory / MANIFEST} is damaged: it lacks {', '.join(missing)}. Run `ssmc compress` again."
        )
