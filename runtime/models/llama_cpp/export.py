"""A GGUF export as benchmarks and evaluations see a model: what its manifest says, and a session of llama.cpp's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ssmc.runtime.errors import CheckpointError, UsageError
from ssmc.runtime.manifest import MANIFEST, ExportManifest, read_manifest
from ssmc.runtime.models.architectures.dimensions import (
    Dimensions,
    HybridDimensions,
    Mamba2HybridDimensions,
    from_dict,
)
from ssmc.runtime.models.llama_cpp.client import PACKAGE, is_installed
from ssmc.runtime.models.llama_cpp.session import LlamaSession
from ssmc.runtime.models.memory import Footprint, sequence_memory

FORMAT, FILE = "gguf", "model.gguf"


@dataclass(frozen=True)
class GgufExport:
    """The counterpart of `runtime.models.checkpoints.Checkpoint`.

    Attributes:
        model: a session of llama.cpp's.
        source: as the user named it.
        directory: where it lies.
        dimensions: its sizes.
        parameters: how many numbers the model has.
        stored_dtype: of the large matrices, "f32" or how they were quantised.
        format: always "gguf".
    """

    model: LlamaSession
    source: str
    directory: Path
    dimensions: Dimensions
    parameters: int
    stored_dtype: str
    format: str = FORMAT

    @property
    def state_bytes(self) -> int:
        """Bytes of recurrent state one sequence occupies."""
        return self.dimensions.state_bytes()

    def footprint(self, length: int) -> Footprint | None:
        """The file in memory, with states in float32; None for hybrids, of whose keys and values it says nothing."""
        if isinstance(self.dimensions, HybridDimensions | Mamba2HybridDimensions):
            return None
        return Footprint(self.weight_bytes, sequence_memory(self.dimensions, 0, length, "float32"))

    @property
    def weight_bytes(self) -> int:
        """Bytes on disk."""
        return (self.directory / FILE).stat().st_size


def is_gguf_export(source: str | Path) -> bool:
    """Whether a folder is a GGUF export of ssmc's."""
    folder = Path(source).expanduser() if str(source) else Path(".")
    if not (folder / MANIFEST).is_file():
        return False
    manifest = read_manifest(folder)
    return isinstance(manifest, ExportManifest) and manifest.format == FORMAT


def check_llama_cpp(device: str = "cpu") -> None:
    """Make sure that llama.cpp can be asked.

    Args:
        device: it is asked on the CPU only, also where torch has a GPU.

    Raises:
        UsageError: it is not installed, or another device is wanted.
    """
    if not is_installed():
        raise UsageError(f"GGUF files are run by llama.cpp, which is not installed: pip install {PACKAGE}.")
    if device != "cpu":
        raise UsageError(f"GGUF files are run on the CPU here, not on {device}. Use --device cpu.")


def load_gguf_export(folder: str | Path, *, context: int = 4096, threads: int | None = None) -> GgufExport:
    """Have llama.cpp load an export.

    Args:
        folder: what `ssmc export --format gguf` wrote.
        context: tokens of a sequence, to begin with.
        threads: None: as many as torch takes.

    Raises:
        UsageError: llama.cpp is not installed.
        CheckpointError: files are missing or damaged.
    """
    directory = Path(folder).expanduser()
    manifest, dimensions, stored_dtype = described(directory)
    check_llama_cpp()
    if not (directory / FILE).is_file():
        raise CheckpointError(f"{directory / FILE} is missing. Export the model again.")
    return GgufExport(
        model=LlamaSession(directory / FILE, dimensions.vocab_size, context=context, threads=threads),
        source=str(folder),
        directory=directory,
        dimensions=dimensions,
        parameters=manifest.parameters or 0,
        stored_dtype=stored_dtype,
    )


def described(directory: Path) -> tuple[ExportManifest, Dimensions, str]:
    """What the manifest of an export says, with its sizes and how its matrices are stored.

    Raises:
        CheckpointError: it is damaged.
    """
    manifest = read_manifest(directory)
    damaged = f"{directory / MANIFEST} is damaged: it lacks sizes. Export the model again."
    if not isinstance(manifest, ExportManifest) or manifest.parameters is None:
        raise CheckpointError(damaged)
    about = manifest.about.get(FORMAT) or {}
    try:
        return manifest, from_dict(manifest.dimensions), str(about.get("quantize", "f32"))
    except (AttributeError, ValueError) as error:
        raise CheckpointError(damaged) from error
