"""What can be refused at once: checks of paths that need no model, made before torch and transformers are loaded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ssmc.runtime.manifest import MANIFEST, read_manifest
from ssmc.runtime.models.checkpoints.sources import check_source

DEFAULT_DIRECTORY = "ssmc-out"


def check_models(models: Iterable[str | Path | None]) -> None:
    """Make sure that every model that is named can exist; None stands for one that is not named.

    Raises:
        CheckpointError: there is no such folder.
    """
    for model in models:
        if model is not None:
            check_source(model)


def check_compressed(directory: str | Path, or_model: bool = False) -> None:
    """Make sure that a folder was written by `ssmc compress` or `ssmc export`.

    Args:
        directory: as the user named it.
        or_model: whether a model of any other kind will do.

    Raises:
        UsageError: it was not.
        CheckpointError: its manifest is damaged, or there is no such model.
    """
    folder = Path(directory).expanduser()
    if or_model and not (folder / MANIFEST).is_file():
        check_source(str(directory) if str(directory) != DEFAULT_DIRECTORY else folder)
    else:
        read_manifest(folder)
