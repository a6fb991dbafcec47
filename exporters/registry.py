"""The export formats there are. Adding one is one file: a subclass of `Format`, and a call of `register_format`."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ssmc.exporters.format import Format, option_names
from ssmc.exporters.formats import FORMATS
from ssmc.runtime.errors import UsageError

if TYPE_CHECKING:
    from ssmc.runtime.models.families import Architecture

_ADDED: dict[str, Format] = {}


def register_format(format: Format) -> Format:
    """Make a format known to `export` and to the command line, under its name.

    Raises:
        ValueError: another one has the name.
    """
    if format.name in FORMATS or _ADDED.setdefault(format.name, format) is not format:
        raise ValueError(f"there is an export format {format.name!r} already")
    return format


def all_formats() -> Mapping[str, Format]:
    """All formats by name, those of ssmc first, then in the order they were registered."""
    return {**FORMATS, **_ADDED}


def format_named(name: str) -> Format:
    """The format of a name.

    Raises:
        UsageError: naming those there are.
    """
    known = all_formats()
    if name not in known:
        raise UsageError(f"There is no export format {name!r}; there are {', '.join(known)}.")
    return known[name]


def settings_of(format: Format, given: Mapping[str, Any]) -> Any:
    """A format's options from those a user gave, by name; None and False stand for not given.

    Raises:
        UsageError: some belong to other formats, or a value makes no sense.
    """
    given = {name: value for name, value in given.items() if value is not None and value is not False}
    known = {name: [other.name for other in all_formats().values() if name in option_names(other)] for name in given}
    if unknown := [name for name, owners in known.items() if not owners]:
        raise TypeError(f"export() got an unexpected keyword argument {unknown[0]!r}")
    for name, owners in known.items():
        if format.name not in owners:
            raise UsageError(
                f"--{name} is an option of the format {' and '.join(owners)}, not of {format.name}. Leave it out, or "
                f"use --format {owners[0]}."
            )
    return format.settings(given)


def require_packages(format: Format) -> None:
    """Import what a format needs beside ssmc's own dependencies.

    Raises:
        UsageError: something is not installed.
    """
    for package in format.packages:
        try:
            import_module(package)
        except ImportError as error:
            raise UsageError(
                f"The format {format.name} needs {error.name}: pip install 'ssmc[{format.extra}]'."
            ) from error


def refuse_missing(format: Format, architecture: Architecture) -> None:
    """Refuse a family that cannot be exported to a format.

    Raises:
        UsageError: with the reason.
    """
    if reason := format.missing(architecture):
        raise UsageError(f"There is no export to {format.name} for this model: {reason}. Use --format safetensors.")


def missing_formats(architecture: Architecture) -> dict[str, str]:
    """The formats a family cannot be exported to, with the reason."""
    reasons = {name: format.missing(architecture) for name, format in all_formats().items()}
    return {name: reason for name, reason in reasons.items() if reason is not None}
