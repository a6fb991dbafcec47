"""How many sequences fit beside the weights, as the first table of a report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ssmc.cli.terminal import Terminal, table
from ssmc.runtime.manifest import MANIFEST, MaskedManifest, read_manifest
from ssmc.runtime.models.memory import LENGTH, Footprint, format_bytes, rooms

INT8 = "int8"

if TYPE_CHECKING:
    from ssmc.runtime.models.outline import Outline


def footprints_of(model: str | Path, outline: Outline, length: int) -> dict[str, Footprint]:
    """A model in memory by its name in a report: beside a dense model the compressed one, the dense model first.

    Args:
        model: as the user named it.
        outline: of the model.
        length: tokens of a sequence.

    Returns:
        Of what `compress` wrote, the dense and the compressed model; of an export, the dense one where it can be found
        without fetching anything; of any other model, what removing states would bring.
    """
    from ssmc.runtime.models.inspection import footprint
    from ssmc.runtime.models.outline import read_outline

    whole, folder = footprint(outline, length), Path(model).expanduser()
    if not str(model) or not (folder / MANIFEST).is_file():
        quarter = outline.dimensions.d_state // 4
        found = {"dense": whole, "int8 states": footprint(outline, length, INT8)}
        if quarter:
            found["a quarter of them"] = footprint(outline, length, d_state=quarter)
            found["a quarter, int8"] = footprint(outline, length, INT8, d_state=quarter)
        return found
    manifest = read_manifest(folder)
    if isinstance(manifest, MaskedManifest):
        left, stored = manifest.left, manifest.packed_bytes
        smaller = {name: footprint(outline, length, name, stored, **left) for name in ("float32", INT8)}
        name = "compressed" if stored is None else "in codes"
        return {"dense": whole, name: smaller["float32"], "with int8 states": smaller[INT8]}
    beside = folder.parent / (manifest.source.relative or "")
    named = manifest.source.model or ""
    origin = str(beside) if manifest.source.relative and beside.is_dir() else named
    here = bool(origin) and (Path(origin).is_dir() or "/" not in origin)
    dense = read_outline(origin) if here else None
    own = {"this export": whole, "with int8 states": footprint(outline, length, INT8)}
    return ({} if dense is None else {"dense": footprint(dense, length)}) | own


def show_written(terminal: Terminal, directory: Path, length: int = LENGTH) -> None:
    """Print it for a folder that was written just now; nothing where its files do not say enough."""
    from ssmc.runtime.models.outline import read_outline

    if not terminal.quiet and (outline := read_outline(directory)) is not None:
        show_sequences(terminal, footprints_of(directory, outline, length), outline.stored_dtype)


def show_sequences(terminal: Terminal, footprints: Mapping[str, Footprint], dtype: str) -> None:
    """Print what a sequence keeps and how many fit, a column for every model.

    Args:
        terminal: where to.
        footprints: by the name of the model, the dense one first; all of the same length.
        dtype: of the weights.
    """
    every = list(footprints.values())
    length = every[0].sequence.length
    shown = table(f"Sequences in memory, {length:,} tokens each", "", *footprints)
    shown.add_row("weights", *(format_bytes(each.weights) for each in every))
    shown.add_row("one sequence", *(format_bytes(each.sequence.total) for each in every))
    for name, part in (("SSM states", "states"), ("convolution", "windows"), ("keys, values", "attention")):
        sizes = [getattr(each.sequence, part) for each in every]
        if any(sizes):
            shown.add_row(f"  {name}", *map(format_bytes, sizes))
    for room in rooms():
        shown.add_row(room.name, *(_count(each.fitting(room), every[0].fitting(room)) for each in every))
    shown.caption = f"SSM states in float32 unless int8 is said, all else in {dtype}; activations are not counted"
    terminal.show(shown)


def _count(count: int | None, dense: int | None) -> str:
    """How many fit, and how many times as many as of the dense model."""
    if count is None:
        return "weights do not fit"
    factor = f" ({count / dense:.2f}x)" if dense and count != dense else ""
    return f"{count:,}{factor}"
