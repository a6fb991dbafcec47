"""What a model is before anything is computed: where its parameters, its work and its recurrent state sit."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch

from ssmc.runtime.models.checkpoints import Checkpoint, parameter_count, tensor_bytes

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


def inspect(checkpoint: Checkpoint) -> Inspection:
    """Count, without running the model.

    A multiply-add of a matrix product is one weight used once; a state of the scan takes three a token (it decays, is
    driven, and is read). On a CPU or GPU that decodes one sequence, time goes by the bytes of the weights instead.
    """
    sizes, tensors = checkpoint.dimensions, checkpoint.tensors()
    states = sizes.mixers * sizes.d_inner * sizes.d_state
    dtypes = sorted({str(dtype).removeprefix("torch.") for dtype in checkpoint.dtypes.values()})
    return Inspection(
        source=checkpoint.source,
        model_type=checkpoint.architecture.model_type,
        format=checkpoint.format,
        dtypes=tuple(dtypes),
        dimensions=sizes.as_dict(),
        parameters=parameter_count(tensors),
        weight_bytes=tensor_bytes(tensors),
        ssm_state_bytes=4 * states,
        conv_state_bytes=sizes.state_bytes() - 4 * states,
        parts=tuple(_parts(checkpoint, tensors, 3 * states)),
        notes=checkpoint.notes,
    )


def _parts(checkpoint: Checkpoint, tensors: dict[str, torch.Tensor], scan: int) -> list[Part]:
    """The modules in the order they first appear, then the scan; a tied head works without parameters of its own."""
    parameters: dict[str, int] = defaultdict(int)
    work: dict[str, int] = defaultdict(int)
    architecture, config = checkpoint.architecture, checkpoint.config
    for name, tensor in tensors.items():
        part = EMBEDDING if name == architecture.embedding else _part(name, architecture.mixer_name)
        parameters[part] += tensor.numel()
        if tensor.ndim > 1 and part not in (EMBEDDING, "A_log"):
            work[part] += round(tensor.numel() * architecture.uses(name, config))
    if config.tie_word_embeddings:
        parameters[HEAD] += 0
        work[HEAD] += parameters[EMBEDDING]
    parameters[SCAN] += 0
    work[SCAN] += scan
    return [Part(name, count, work[name]) for name, count in parameters.items()]


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
