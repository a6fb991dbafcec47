"""What a model is before anything is computed: where its parameters, its work and its recurrent state sit."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from ssmc.runtime.models.memory import Footprint, sequence_memory
from ssmc.runtime.models.outline import Outline

SCAN = "scan"
EMBEDDING, HEAD = "embedding", "head"
# Parts of mixers of all kinds: Nemotron-H calls attention and MLP so, too.
_OF_MIXERS = {"norm": "gated norm", "gate": "router"}
_OF_MIXERS |= dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "attention")
_OF_MIXERS |= dict.fromkeys(("up_proj", "down_proj", "shared_experts"), "MLP")
# Words in the names of what is no part of a mixer, the first that fits.
_OTHERS = {
    "lm_head": HEAD,
    "shared_transformer": "shared blocks",
    "linear": "shared blocks",
    "self_attn": "attention",
    "experts": "experts",
    "router": "router",
}
_OTHERS |= dict.fromkeys(("feed_forward", "mlp", "shared_mlp"), "MLP")


@dataclass(frozen=True)
class Part:
    """One kind of module, all layers together."""

    name: str  # "in_proj"; "scan" has no parameters of its own
    parameters: int
    multiply_adds: int  # for one token


@dataclass(frozen=True)
class Inspection:
    """A model in numbers."""

    source: str
    model_type: str
    format: str
    dtypes: tuple[str, ...]
    dimensions: dict[str, Any]
    parameters: int  # a tied head counted once
    weight_bytes: int
    ssm_state_bytes: int  # of one sequence, float32, all layers
    conv_state_bytes: int
    parts: tuple[Part, ...]
    notes: tuple[str, ...] = ()  # what was not as it should be in its files

    @property
    def multiply_adds(self) -> int:
        """For one token, without element-wise work."""
        return sum(part.multiply_adds for part in self.parts)


def inspect(outline: Outline) -> Inspection:
    """Count, without running the model or reading a number of it.

    A multiply-add of a matrix product is one weight used once; a state of the scan takes three a token (it decays, is
    driven, and is read). On a CPU or GPU that decodes one sequence, time goes by the bytes of the weights instead.
    """
    sizes = outline.dimensions
    states = sizes.ssm_numbers
    return Inspection(
        source=outline.source,
        model_type=outline.architecture.model_type,
        format=outline.format,
        dtypes=tuple(sorted(set(outline.dtypes.values()))),
        dimensions=sizes.as_dict(),
        parameters=outline.parameters,
        weight_bytes=outline.weight_bytes,
        ssm_state_bytes=4 * states,
        conv_state_bytes=4 * sizes.window_numbers,
        parts=tuple(_parts(outline, 3 * states)),
        notes=outline.notes,
    )


def footprint(
    outline: Outline, length: int, state_dtype: str = "float32", stored: int | None = None, **left: int
) -> Footprint:
    """A model in memory, its weights and what attention and convolutions keep in the type its weights are stored in.

    Args:
        outline: of the model.
        length: tokens of a sequence.
        state_dtype: how SSM states are kept.
        stored: bytes of the weights; None where they are those of the files.
        left: n_layer, d_inner, d_state or d_model of a smaller model of the same family; of a hybrid, the last two.
    """
    dense, architecture = outline.dimensions, outline.architecture
    own = {"n_layer": dense.n_layer, "d_inner": dense.d_inner, "d_state": dense.d_state} | left
    weights = outline.weight_bytes if stored is None else stored
    if left:
        weights = round(weights * outline.count(**own) / outline.parameters)
    kept = architecture.kept_per_token(outline.config)
    sequence = sequence_memory(replace(dense, **own), kept, length, outline.stored_dtype, state_dtype)
    return Footprint(weights, sequence)


def _parts(outline: Outline, scan: int) -> list[Part]:
    """The modules and the scan, most work first; a tied head works without parameters of its own."""
    parameters: dict[str, int] = defaultdict(int)
    work: dict[str, int] = defaultdict(int)
    architecture, config = outline.architecture, outline.config
    for name, shape in outline.shapes.items():
        part = EMBEDDING if name == architecture.embedding else _part(name, architecture.mixer_name)
        parameters[part] += prod(shape)
        if len(shape) > 1 and part not in (EMBEDDING, "A_log"):
            work[part] += round(prod(shape) * architecture.uses(name, config))
    if config.tie_word_embeddings:
        parameters[HEAD] += 0
        work[HEAD] += parameters[EMBEDDING]
    parameters[SCAN] += 0
    work[SCAN] += scan
    parts = [Part(name, count, work[name]) for name, count in parameters.items()]
    return sorted(parts, key=lambda part: (-part.multiply_adds, -part.parameters, part.name))


def _part(name: str, mixer: str) -> str:
    """ "in_proj" for backbone.layers.3.mixer.in_proj.weight."""
    words = name.split(".")
    if mixer in words:
        part = words[words.index(mixer) + 1]
        return _OF_MIXERS.get(part, part)
    for word, part in _OTHERS.items():
        if word in words:
            return part
    return "norms"
