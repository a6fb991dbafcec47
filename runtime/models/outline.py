"""A model by the names, shapes and types of its tensors: enough to say what it is, without reading a number of it.

`read_outline` takes them from the headers of safetensors files, so neither torch nor transformers is loaded.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ssmc.runtime.models.architectures.plan import CHANNEL, HEAD, MODEL, STATE
from ssmc.runtime.models.checkpoints.foreign import foreign
from ssmc.runtime.models.checkpoints.sources import check_source, download_configuration, hub_headers
from ssmc.runtime.models.families import Architecture, Dimensions, find_family
from ssmc.runtime.models.memory import ITEMSIZE

if TYPE_CHECKING:
    from ssmc.runtime.models.checkpoints import Checkpoint

_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # as safetensors names them
_HEAD = "lm_head.weight"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Outline:
    """What a model consists of.

    Attributes:
        source: as the user named it.
        format: of the directory, as `Checkpoint.format`.
        architecture: its family.
        config: its configuration, transformers' or config.json as it is.
        shapes: name -> shape, by the model's names, without a tied head.
        dtypes: name -> "float32", "float16" or "bfloat16".
        notes: what was odd about the files and could be mended.
    """

    source: str
    format: str
    architecture: Architecture
    config: Any
    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, str]
    notes: tuple[str, ...] = ()

    @property
    def dimensions(self) -> Dimensions:
        """The sizes of the model."""
        return self.architecture.dimensions(self.config)

    @property
    def parameters(self) -> int:
        """How many numbers the model has."""
        return sum(map(prod, self.shapes.values()))

    @property
    def stored_dtype(self) -> str:
        """The type that most of the model is stored in: that of the embedding."""
        return self.dtypes[self.architecture.embedding]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return sum(prod(shape) * ITEMSIZE[self.dtypes[name]] for name, shape in self.shapes.items())

    def mixer_shapes(self, layer: int) -> dict[str, Shape]:
        """The tensors of a layer's mixer that the family's table lists, by their names in it; empty without a mixer."""
        architecture, prefix = self.architecture, self.architecture.mixer_prefix(layer)
        if f"{prefix}A_log" not in self.shapes:
            return {}
        return {name: self.shapes[prefix + name] for name in architecture.plan.tensors if prefix + name in self.shapes}

    def count(self, n_layer: int, d_inner: int, d_state: int, d_model: int | None = None) -> int:
        """How many parameters a model of the same family with these sizes has; layers of a hybrid stay."""
        sizes = self.dimensions
        share = {CHANNEL: d_inner, HEAD: d_inner * (sizes.heads or 0) // sizes.d_inner, STATE: d_state * sizes.groups}
        saved = outside = 0
        if d_model is not None and d_model < sizes.d_model:
            share[MODEL] = d_model
            inside, outside = self._narrower(1 - d_model / sizes.d_model)
            saved += inside
        for layer in range(sizes.n_layer):
            shapes = self.mixer_shapes(layer)
            new = self.architecture.plan.sizes(shapes) | share if shapes else {}
            for name, shape in shapes.items():
                axes = zip(self.architecture.plan.tensors[name], shape, strict=True)
                saved += prod(shape) - prod(sum(new[part] for part in parts) if parts else size for parts, size in axes)
        blocks = sum(prod(shape) for name, shape in self.shapes.items() if self._is_of_block(name)) - saved
        return self.parameters - saved - outside - round(blocks * (sizes.n_layer - n_layer) / sizes.n_layer)

    def _narrower(self, share: float) -> tuple[int, int]:
        """What tensors beside the mixers lose with a share of d_model: those of blocks, and those outside."""
        mixers = {
            self.architecture.mixer_prefix(layer) + name
            for layer in range(self.dimensions.n_layer)
            for name in self.mixer_shapes(layer)
        }
        wide = [name for name, shape in self.shapes.items() if self.dimensions.d_model in shape and name not in mixers]
        lost = {name: round(prod(self.shapes[name]) * share) for name in wide}
        inside = sum(count for name, count in lost.items() if self._is_of_block(name))
        return inside, sum(lost.values()) - inside

    def _is_of_block(self, name: str) -> bool:
        return name.startswith(self.architecture.block_prefix(0).removesuffix("0."))


def outline(checkpoint: Checkpoint) -> Outline:
    """The outline of a model in memory."""
    return Outline(
        source=checkpoint.source,
        format=checkpoint.format,
        architecture=checkpoint.architecture,
        config=checkpoint.config,
        shapes={name: tuple(tensor.shape) for name, tensor in checkpoint.tensors().items()},
        dtypes={name: str(dtype).removeprefix("torch.") for name, dtype in checkpoint.dtypes.items()},
        notes=tuple(checkpoint.notes),
    )


def read_outline(source: str | Path, stock: bool = False) -> Outline | None:
    """The outline of a model from config.json and the headers of its safetensors files.

    Args:
        source: a folder, or an embedded model.
        stock: let transformers read config.json, which knows what the configurations of some hybrids leave out; to
            load it takes seconds.

    Returns:
        None where it takes more to tell: a model of the hub, another layout, a pickle, experts in files of their own,
        or something that does not fit. `load_checkpoint` reads the first ones, and says what is wrong with the last.

    Raises:
        CheckpointError: there is no such directory.
    """
    directory = check_source(source)
    return None if directory is None else _read(str(source), directory, partial(_headers, directory), stock)


def read_hub_outline(hub_id: str, stock: bool = False) -> Outline | None:
    """As `read_outline`, of a model of the hub, whose weights stay there but for their headers.

    Raises:
        CheckpointError: there is no network, no such model or no such revision.
    """
    return _read(hub_id, download_configuration(hub_id), partial(hub_headers, hub_id), stock)


def _read(source: str, directory: Path, headers_of: Callable[[], dict[str, Any]], stock: bool) -> Outline | None:
    try:
        raw = json.loads((directory / "config.json").read_text(encoding="utf-8"), object_hook=_number)
        architecture = find_family(raw.get("model_type"))
        if architecture is None or raw.get("quantization_config"):
            return None
        headers = headers_of()
        if foreign(headers):
            return None
        found = architecture.from_stored(headers)
        config = SimpleNamespace(**{"tie_word_embeddings": _HEAD not in found} | raw)
        if stock:
            from ssmc.runtime.models.checkpoints.checkpoint import read_description

            _, config = read_description(directory, source)
        shapes = {name: tuple(shape) for name, (shape, _) in found.items()}
        dtypes = {name: _TYPES[dtype] for name, (_, dtype) in found.items()}
        read = Outline(source, "transformers", architecture, config, shapes, dtypes)
        return read if _fits(read) else None
    except Exception:  # whatever is odd about it, `load_checkpoint` has a sentence for it
        return None


def _number(value: dict[str, Any]) -> Any:
    """An object of config.json, or the number it stands for: {"__float__": "Infinity"}, as transformers writes it."""
    return float(value["__float__"]) if value.keys() == {"__float__"} else value


def _headers(directory: Path) -> dict[str, Any]:
    """Shape and type of every tensor by its stored name."""
    from safetensors import safe_open

    files = [directory / _WEIGHTS]
    if not files[0].is_file():
        index = json.loads((directory / _INDEX).read_text(encoding="utf-8"))
        files = [directory / name for name in sorted(set(index["weight_map"].values()))]
    found = {}
    for path in files:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                found[name] = (part.get_shape(), part.get_dtype())
    return found


def _fits(read: Outline) -> bool:
    """Whether configuration and tensors speak of the same model, as far as shapes tell."""
    sizes, architecture = read.dimensions, read.architecture
    if read.config.tie_word_embeddings and _HEAD in read.shapes:
        return False
    if not all(isinstance(size, int) and size > 0 for size in sizes.as_dict().values()):
        return False
    architecture.kept_per_token(read.config)  # which needs more of a configuration than a file may say
    if read.shapes[architecture.embedding] != (sizes.vocab_size, sizes.d_model):
        return False
    mixers = [shapes for layer in range(sizes.n_layer) if (shapes := read.mixer_shapes(layer))]
    wanted = {MODEL: sizes.d_model, CHANNEL: sizes.d_inner, STATE: sizes.d_state * sizes.groups}
    found = [architecture.plan.sizes(shapes).items() for shapes in mixers]
    if len(mixers) != sizes.mixers or any(wanted.items() - there for there in found):
        return False
    return not architecture.capabilities.uniform or _are_alike(read)


def _are_alike(read: Outline) -> bool:
    """Whether every layer has the same tensors of the same shapes."""
    start = read.architecture.block_prefix(0).removesuffix("0.")
    layers: Counter[tuple[str, Shape]] = Counter()
    for name, shape in read.shapes.items():
        if name.startswith(start):
            number, _, rest = name.removeprefix(start).partition(".")
            layers[rest, shape] += 1
            if int(number) >= read.dimensions.n_layer:
                return False
    return set(layers.values()) == {read.dimensions.n_layer}
