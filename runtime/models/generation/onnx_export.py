"""An ONNX export as benchmarks and evaluations see a model: what its manifest says, and a session of its graph."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssmc.runtime.errors import CheckpointError
from ssmc.runtime.manifest import MANIFEST, ExportManifest, read_manifest
from ssmc.runtime.models.checkpoints import read_dimensions
from ssmc.runtime.models.families import Dimensions
from ssmc.runtime.models.generation.onnx_graph import GRAPH, open_graph
from ssmc.runtime.models.generation.onnx_session import OnnxSession
from ssmc.runtime.models.memory import Footprint, SequenceMemory
from ssmc.runtime.progress import NO_PROGRESS, Progress

FORMAT = "onnx"
WINDOW = "conv"  # in the name of a state of a convolution


@dataclass(frozen=True)
class OnnxExport:
    """The counterpart of `runtime.checkpoints.Checkpoint`.

    Attributes:
        model: a session of the graph.
        source: as the user named it.
        directory: where it lies.
        dimensions: sizes; where layers differ, the largest.
        parameters: how many numbers the model has.
        stored_dtype: of the weights on disk, "float32", or how they were quantised.
        format: always "onnx".
    """

    model: OnnxSession
    source: str
    directory: Path
    dimensions: Dimensions
    parameters: int
    stored_dtype: str
    format: str = FORMAT

    @property
    def state_bytes(self) -> int:
        """Bytes of recurrent state one sequence occupies."""
        return sum(math.prod(slot.shape) * slot.dtype.itemsize for slot, _ in self.model.graph.states)

    def footprint(self, length: int) -> Footprint:
        """The graph in memory: its weights as they are on disk, and states twice, as a step reads and writes them."""
        slots = [slot for slot, _ in self.model.graph.states]
        windows = sum(math.prod(slot.shape) * slot.dtype.itemsize for slot in slots if WINDOW in slot.name)
        kept = 2 * 4 * self.kept_per_token * length
        return Footprint(self.weight_bytes, SequenceMemory(length, 2 * (self.state_bytes - windows), 2 * windows, kept))

    @property
    def kept_per_token(self) -> int:
        """Numbers that attention keeps of every token: keys, values, and whether it is real."""
        growing = [past for past, _ in self.model.graph.states if past.grows is not None]
        return sum(math.prod(size for place, size in enumerate(p.shape) if place != p.grows) for p in growing)

    @property
    def weight_bytes(self) -> int:
        """Bytes on disk of the graph and its weights."""
        return sum(path.stat().st_size for path in self.directory.glob(f"{GRAPH}*"))


def load_onnx_export(
    folder: str | Path, device: str = "auto", all_logits: bool = False, progress: Progress = NO_PROGRESS
) -> OnnxExport:
    """Read an ONNX export.

    Args:
        folder: what `ssmc export --format onnx` wrote.
        device: "cpu", "cuda" or "auto".
        all_logits: let the graph give the logits of all tokens, to score a text with; see `open_graph`.
        progress: told what is being done.

    Raises:
        UsageError: onnxruntime is missing, or cannot use the device.
        CheckpointError: files are missing or damaged.
    """
    directory = Path(folder).expanduser()
    manifest = read_manifest(directory)
    if not isinstance(manifest, ExportManifest) or manifest.parameters is None:
        raise CheckpointError(f"{directory / MANIFEST} is damaged: it lacks parameters. Export the model again.")
    dimensions = read_dimensions(directory)
    return OnnxExport(
        model=OnnxSession(open_graph(directory, device, all_logits, progress)),
        source=str(folder),
        directory=directory,
        dimensions=dimensions,
        parameters=manifest.parameters,
        stored_dtype=_stored_dtype(manifest.about.get("settings")),
    )


def _stored_dtype(settings: Any) -> str:
    settings = settings if isinstance(settings, dict) else {}
    return str(settings.get("quantize") or settings.get("dtype") or "float32")
