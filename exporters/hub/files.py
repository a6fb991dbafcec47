"""What of an export is published: the files its manifest vouches for, whole and unchanged."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssmc.runtime.errors import CheckpointError, UsageError
from ssmc.runtime.files import sha256
from ssmc.runtime.manifest import MANIFEST, ExportManifest, read_manifest
from ssmc.runtime.models.checkpoints.sources import EMBEDDED, is_hub_id
from ssmc.runtime.models.companions import OTHER_README, README

_PLACES = ("model", "calib", "tokenizer", "latency_table", "text")  # options that may name a place on this machine


@dataclass(frozen=True)
class Export:
    """An export that is whole.

    Attributes:
        folder: where it lies.
        manifest: what it is.
        files: its files by the names they get in the repository, without the manifest and the model card.
        readme: the README of the model it was made from, or of its format; None where there is none.
    """

    folder: Path
    manifest: ExportManifest
    files: Mapping[str, Path]
    readme: str | None


def read_export(directory: str | Path) -> Export:
    """Find what is to be published, and see that nothing of it is missing or was changed.

    Raises:
        UsageError: it is no export.
        CheckpointError: it is not whole.
    """
    folder = Path(directory).expanduser()
    manifest = read_manifest(folder)
    if not isinstance(manifest, ExportManifest):
        raise UsageError(
            f"{directory} is a compressed model in its original shape, not an export. Run `ssmc export` on it first, "
            "and push the folder that it writes."
        )
    if not manifest.files:
        raise CheckpointError(f"{folder / MANIFEST} names no files. Export the model again.")
    files = {}
    for name, record in manifest.files.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts or not path.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(f"{folder / MANIFEST} names {name!r}, which is outside its folder. Export again.")
        if not os.path.isfile(path):  # which takes any name, also one that no system can have
            raise CheckpointError(f"{path} is missing, so the export is not whole. Export the model again.")
        if path.stat().st_size != record.get("bytes") or sha256(path) != record.get("sha256"):
            raise CheckpointError(f"{path} is not the file that was exported. Export the model again.")
        files[OTHER_README if name == README else name] = path
    readme = next((folder / name for name in (OTHER_README, README) if name in manifest.files), None)
    return Export(
        folder, manifest, files, None if readme is None else readme.read_text(encoding="utf-8", errors="replace")
    )


def base_of(manifest: ExportManifest) -> str | None:
    """The model of the hub that the export was made from, where its manifest names one."""
    model = manifest.source.model
    return model.split("@")[0] if model and not manifest.source.relative and is_hub_id(model) else None


def public_manifest(manifest: ExportManifest) -> str:
    """The content of ssmc.json without the places of this machine: of a path its last part is left."""
    content = manifest.to_json()
    content["source"] = {**content["source"], "model": _public(content["source"]["model"]), "relative": None}
    if content["config"]:
        content["config"] = {k: _public(v) if k in _PLACES else v for k, v in content["config"].items()}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _public(place: Any) -> Any:
    if not isinstance(place, str) or place in EMBEDDED:
        return place
    path = Path(place).expanduser()
    return path.name if path.is_absolute() or path.exists() or place.startswith((".", "~")) else place
