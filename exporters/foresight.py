"""What an export for a runtime would refuse, refused before minutes of compressing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ssmc.exporters.registry import format_named, refuse_missing
from ssmc.runtime.models.checkpoints import read_description
from ssmc.runtime.models.checkpoints.sources import find_directory
from ssmc.runtime.models.consumers import consumer_named, refuse_family
from ssmc.runtime.models.families import Architecture
from ssmc.runtime.models.tokenizers import tokenizer_directory


def refuse_unfit(model: str | Path, runtime: str, tokenizer: str | Path | None = None) -> None:
    """Refuse a model by its configuration and tokenizer, where no export of it could run in a runtime.

    Args:
        model: a folder, a hub id, or an embedded model.
        runtime: see `ssmc.runtime.models.consumers`.
        tokenizer: as `compress` is told it, where the model has none of its own.

    Raises:
        SsmcError: with the reason.
    """
    format, directory = format_named(consumer_named(runtime).format), find_directory(model)
    architecture, config = read_description(directory, str(model))
    refuse_family(runtime, architecture)
    refuse_missing(format, architecture)
    format.foresee(architecture, config, tokenizer_directory(directory, tokenizer))


def refuse_left(runtime: str, architecture: Architecture, config: Any) -> None:
    """Refuse what a run would leave, by its configuration, where the runtime could not run it.

    Raises:
        SsmcError: with the reason.
    """
    format_named(consumer_named(runtime).format).foresee(architecture, config, None)
