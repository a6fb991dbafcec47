"""`ssmc.json`: what an artefact is, how it was made, and from what; one schema for writer and reader.

A manifest carries no date, duration or machine: the same run gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ssmc.runtime.errors import CheckpointError, UsageError
from ssmc.runtime.files import sha256

MANIFEST = "ssmc.json"
SCHEMA = 2
READ = (1, 2)  # ssmc 0.1 wrote 1
BLOCK, SSM = "block", "ssm"
EXPORTS = {
    "torch": ("safetensors", "mamba-ssm", "sparse24", "compressed-tensors"),
    "onnx": ("onnx",),
    "llama.cpp": ("gguf",),
}
"""Runtime -> folders of an artefact that hold exports for it, the first choice first."""

RUNTIMES = tuple(EXPORTS)

_EVERYWHERE = ("kind", "source")
_LEFT_OUT = "left out: "  # how schema 1 begins what it says of a module that was left as it is


@dataclass(frozen=True)
class Origin:
    """The dense model.

    Attributes:
        model: as the user named it.
        format: its checkpoint format.
        relative: its folder, seen from the artefact; None for a model that is no folder.
    """

    model: str | None = None
    format: str | None = None
    relative: str | None = None


@dataclass(frozen=True)
class ModuleRecord:
    """What happened to the weight of one module.

    Attributes:
        name: within its mixer, "in_proj".
        target: the sparsity or the N:M pattern it was given; None where it was left as it is.
        zeros: part of its numbers that is zero.
        error: squared error of its output, relative to the output's energy; None where it was not measured.
        left_out: why it was left as it is.
    """

    name: str
    target: str | None = None
    zeros: float | None = None
    error: float | None = None
    left_out: str | None = None

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> ModuleRecord:
        """Read an entry of either schema."""
        known = {name: entry.get(name) for name in cls.__dataclass_fields__ if name != "name"}
        target = known["target"]
        if isinstance(target, str) and target.startswith(_LEFT_OUT):
            known |= {"target": None, "left_out": target.removeprefix(_LEFT_OUT)}
        return cls(entry["name"], **known)


@dataclass(frozen=True)
class LayerRecord:
    """What is left of one layer.

    Attributes:
        kept: the states that stay, of all groups.
        kept_channels: the channels of d_inner that stay; None for all.
        modules: those whose single weights were pruned.
        findings: what the methods measured there, by name.
        kept_units: neurons, query heads and such that stay, by kind; those not named are all there.
    """

    kept: tuple[int, ...]
    kept_channels: tuple[int, ...] | None = None
    modules: tuple[ModuleRecord, ...] = ()
    findings: Mapping[str, Any] = field(default_factory=dict)
    kept_units: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The entry of the manifest; findings stand beside the rest."""
        channels = None if self.kept_channels is None else list(self.kept_channels)
        entry: dict[str, Any] = {"kept": list(self.kept), "kept_channels": channels, **self.findings}
        if self.kept_units:
            entry["kept_units"] = {kind: list(units) for kind, units in self.kept_units.items()}
        return entry | {"modules": [asdict(module) for module in self.modules]}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> LayerRecord:
        """Read an entry of either schema."""
        channels, named = entry.get("kept_channels"), ("kept", "kept_channels", "modules", "kept_units")
        return cls(
            tuple(entry["kept"]),
            None if channels is None else tuple(channels),
            tuple(ModuleRecord.from_json(module) for module in entry.get("modules", ())),
            {key: value for key, value in entry.items() if key not in named},
            {kind: tuple(units) for kind, units in entry.get("kept_units", {}).items()},
        )


@dataclass(frozen=True)
class RemovalRecord:
    """A layer that was removed, in the order of removal.

    Attributes:
        layer: its number.
        part: "block" where the whole block hands on what it reads; "ssm" where only its states are silent.
        calibration_loss: after this removal; None where it was not measured.
        influence: 1 - cosine of what the block reads and puts out; None where the score does not ask.
    """

    layer: int
    part: str
    calibration_loss: float | None = None
    influence: float | None = None


def _removal(entry: Mapping[str, Any]) -> RemovalRecord:
    fields: Any = {name: entry.get(name) for name in RemovalRecord.__dataclass_fields__}
    return RemovalRecord(**fields)


@dataclass(frozen=True)
class CutRecord:
    """A tensor that got smaller; a removed one has no size afterwards."""

    name: str
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class MaskedManifest:
    """What `compress` wrote: a model of the original shape in which pruned parts are silent.

    Attributes:
        source: the dense model.
        versions: of what made it.
        command: the command line; None from Python.
        config: of the run, as a recipe has it.
        calibration: source, sha256, nsamples and seqlen of the calibration text; None where none was needed.
        dimensions: sizes of the model by name.
        layers: what is left of each; empty where only whole layers were removed.
        removed: these layers.
        goal: what a search aimed at in place of a sparsity, and how it was met; None where there was none.
        distilled: what gradient steps towards the dense model's predictions achieved; None where there were none.
        quantized: bits, method, and the size of the weights when they are packed; None where none are in few bits.
        width: coordinates of the residual stream that stay, the first ones of its basis, and how many there were; None:
            all stay.
        parameters: how many numbers the model has.
        files: size and SHA-256 by name.
    """

    source: Origin
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] | None = None
    dimensions: Mapping[str, int] = field(default_factory=dict)
    layers: tuple[LayerRecord, ...] = ()
    removed: tuple[RemovalRecord, ...] = ()
    goal: Mapping[str, Any] | None = None
    distilled: Mapping[str, Any] | None = None
    quantized: Mapping[str, Any] | None = None
    width: Mapping[str, Any] | None = None
    parameters: int | None = None
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def packed_bytes(self) -> int | None:
        """Of all weights with codes in the place of those that are quantised, before cutting; None without codes."""
        return None if self.quantized is None else self.quantized["packed_bytes"] + self.quantized["other_bytes"]

    @property
    def left(self) -> dict[str, int]:
        """The sizes of the smaller model as stock loaders have it, all layers alike; d_model only where it changes."""
        whole, gone = self.dimensions, {removal.layer for removal in self.removed if removal.part == BLOCK}
        every = len(self.layers) == whole["n_layer"]
        layers = [layer for number, layer in enumerate(self.layers) if not (every and number in gone)]
        states = max((len(layer.kept) for layer in layers), default=0) // whole.get("n_groups", 1)
        widths = [whole["d_inner"] if layer.kept_channels is None else len(layer.kept_channels) for layer in layers]
        return {
            "n_layer": whole["n_layer"] - len(gone),
            "d_inner": max(widths, default=whole["d_inner"]),
            "d_state": states or whole["d_state"],
            **({} if self.width is None else {"d_model": int(self.width["kept"])}),
        }

    KIND = "masked"
    REQUIRED = ("versions", "config", "dimensions", "layers", "removed")

    def to_json(self) -> dict[str, Any]:
        """The content of ssmc.json."""
        return {
            "schema": SCHEMA,
            "kind": self.KIND,
            "versions": dict(self.versions),
            "command": self.command,
            "source": asdict(self.source),
            "config": dict(self.config),
            "calibration": self.calibration,
            "dimensions": dict(self.dimensions),
            "layers": [layer.to_json() for layer in self.layers],
            "removed": [asdict(removal) for removal in self.removed],
            **({} if self.goal is None else {"goal": self.goal}),
            **({} if self.distilled is None else {"distilled": dict(self.distilled)}),
            **({} if self.quantized is None else {"quantized": dict(self.quantized)}),
            **({} if self.width is None else {"width": dict(self.width)}),
            "parameters": self.parameters,
            "files": dict(self.files),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> MaskedManifest:
        """Read the content of ssmc.json of either schema; see `read_compressed` for what must be there."""
        config = content.get("config") or {}
        # schema 1 does not say which part went: it follows from the pattern
        part = BLOCK if "layer" in str(config.get("pattern")).split("+") else SSM
        removed: list[dict[str, Any]] = [{"part": part} | dict(entry) for entry in content.get("removed", ())]
        return cls(
            source=_origin(content),
            versions=content.get("versions") or {},
            command=content.get("command"),
            config=config,
            calibration=content.get("calibration"),
            dimensions=content.get("dimensions") or {},
            layers=tuple(LayerRecord.from_json(entry) for entry in content.get("layers", ())),
            removed=tuple(_removal(entry) for entry in removed),
            goal=content.get("goal", content.get("target")),  # 0.1 called it target
            distilled=content.get("distilled"),
            quantized=content.get("quantized"),
            width=content.get("width"),
            parameters=content.get("parameters"),
            files=content.get("files") or {},
        )


@dataclass(frozen=True)
class ExportManifest:
    """What `export` wrote: a smaller model in a format of other software.

    Attributes:
        source: the dense model; its relative path is seen from the folder that holds the export.
        format: as the user named it.
        versions: of what exported it.
        compressed_with: versions of the run that compressed it; None for a dense model.
        config: of that run.
        dimensions: sizes of the model by name.
        cuts: what got smaller.
        comparison: of the written files with the model they were made from.
        parameters: how many numbers the model has.
        files: size and SHA-256 by name.
        about: what the format says of itself, by key.
    """

    source: Origin
    format: str | None
    versions: Mapping[str, str] = field(default_factory=dict)
    compressed_with: Mapping[str, str] | None = None
    config: Mapping[str, Any] | None = None
    dimensions: Mapping[str, int] = field(default_factory=dict)
    cuts: tuple[CutRecord, ...] = ()
    comparison: Mapping[str, Any] = field(default_factory=dict)
    parameters: int | None = None
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    KIND = "export"

    def to_json(self) -> dict[str, Any]:
        """The content of ssmc.json."""
        compressed = None if self.compressed_with is None else dict(self.compressed_with)
        return {
            "schema": SCHEMA,
            "kind": self.KIND,
            "format": self.format,
            "versions": dict(self.versions),
            "compressed_with": compressed,
            "source": asdict(self.source),
            "config": None if self.config is None else dict(self.config),
            "dimensions": dict(self.dimensions),
            **self.about,
            "cuts": [{"name": c.name, "before": list(c.before), "after": list(c.after)} for c in self.cuts],
            "comparison": dict(self.comparison),
            "parameters": self.parameters,
            "files": dict(self.files),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> ExportManifest:
        """Read the content of ssmc.json of either schema; schema 1 has only the versions of the run that compressed."""
        first, own = content["schema"] == 1, set(cls.__dataclass_fields__) | {"schema", "kind"}
        cuts = content.get("cuts") or ()
        return cls(
            source=_origin(content),
            format=content.get("format"),
            versions={} if first else content.get("versions") or {},
            compressed_with=content.get("versions" if first else "compressed_with"),
            config=content.get("config"),
            dimensions=content.get("dimensions") or {},
            cuts=tuple(CutRecord(cut["name"], tuple(cut["before"]), tuple(cut["after"])) for cut in cuts),
            comparison=content.get("comparison") or {},
            parameters=content.get("parameters"),
            files=content.get("files") or {},
            about={key: value for key, value in content.items() if key not in own},
        )


Manifest = MaskedManifest | ExportManifest
_RECORDS = ("layers", "removed", "cuts")


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `manifest` into `directory`, which is not yet visible to anybody else."""
    text = json.dumps(manifest.to_json(), indent=1, ensure_ascii=False)
    (directory / MANIFEST).write_text(text + "\n", encoding="utf-8", newline="\n")


def file_records(files: Iterable[Path], folder: Path | None = None) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of files by name within `folder`, or by their own names, for a manifest."""
    names = {file: file.name if folder is None else file.relative_to(folder).as_posix() for file in sorted(files)}
    return {name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file, name in names.items()}


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest of an artefact, of this version or an earlier one.

    Args:
        directory: what `compress` or `export` wrote.

    Raises:
        UsageError: `directory` is not an artefact of ssmc.
        CheckpointError: the manifest is damaged or of a version this ssmc does not know.
    """
    return _parsed(_content(directory), directory)


def read_compressed(directory: Path) -> MaskedManifest:
    """Read the manifest of what `compress` wrote, with all that a smaller model is cut by; errors as `read_manifest`.

    Raises:
        UsageError: it is an export.
        CheckpointError: it does not say what was pruned.
    """
    content = _content(directory)
    manifest = _parsed(content, directory)
    if isinstance(manifest, ExportManifest):
        raise UsageError(f"{directory} is an export already. Name the folder that `ssmc compress` wrote.")
    _require(content, MaskedManifest.REQUIRED, directory)
    return manifest


def _content(directory: Path) -> dict[str, Any]:
    """What the file of either schema holds."""
    path = directory / MANIFEST
    if not path.is_file():
        if (directory / "adapter_config.json").is_file() and not (directory / "config.json").is_file():
            raise UsageError(
                f"{directory} holds an adapter, not a compressed model. Merge it into its model (peft: "
                "merge_and_unload, then save_pretrained) and compress the result."
            )
        raise UsageError(
            f"{directory} holds no compressed model (no {MANIFEST} in it). Run `ssmc compress MODEL` first, or name "
            "the folder it wrote to."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}). Run `ssmc compress` again.") from error
    if not isinstance(content, dict) or content.get("schema") not in READ:
        found = content.get("schema") if isinstance(content, dict) else None
        raise CheckpointError(
            f"{path} has schema {found!r}, this ssmc reads {' and '.join(map(str, READ))}. Compress again with this "
            "version."
        )
    _require(content, _EVERYWHERE, directory)
    return content


def _parsed(content: Mapping[str, Any], directory: Path) -> Manifest:
    kind = ExportManifest if content["kind"] == ExportManifest.KIND else MaskedManifest
    try:
        return _typed(kind.from_json(content))
    except ValidationError as error:
        first = error.errors()[0]
        place, reason = ".".join(map(str, first["loc"])), first["msg"][0].lower() + first["msg"][1:]
        raise CheckpointError(
            f"{directory / MANIFEST} is damaged ({place}: {reason}). Run `ssmc compress` again."
        ) from error
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{directory / MANIFEST} is damaged ({type(error).__name__}: {error}). Run `ssmc compress` again."
        ) from error


def _typed(manifest: Any) -> Any:
    """The manifest, if everything in it is of the type that its dataclass says.

    Raises:
        ValidationError: it is not.
    """
    fields = {name: getattr(manifest, name) for name in type(manifest).__dataclass_fields__}
    nested: dict[str, Any] = {name: [asdict(entry) for entry in fields[name]] for name in _RECORDS if name in fields}
    nested |= {"source": asdict(fields["source"])}
    kind: Any = type(manifest)
    return _checker(kind).validate_python(fields | nested)


@cache
def _checker(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _require(content: Mapping[str, Any], keys: Iterable[str], directory: Path) -> None:
    if missing := [key for key in keys if key not in content]:
        raise CheckpointError(
            f"{directory / MANIFEST} is damaged: it lacks {', '.join(missing)}. Run `ssmc compress` again."
        )


def _origin(content: Mapping[str, Any]) -> Origin:
    source = content["source"] or {}
    return Origin(*(source.get(name) for name in Origin.__dataclass_fields__))
