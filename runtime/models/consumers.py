"""What other software takes of a model: sizes, export format, and where fewer states and channels are worth something.

One table for all who ask: `--for` of compress and export, and the table of runtimes. Facts were checked in November
2026 by running the software (llama.cpp, onnxruntime, onnxruntime-genai, OpenVINO, mlx-lm, transformers) or by reading
its source (mamba-ssm and vLLM on a GPU).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ssmc.runtime.errors import UsageError
from ssmc.runtime.models.architectures.dimensions import Dimensions

if TYPE_CHECKING:
    from ssmc.runtime.models.architectures.capabilities import Otherwise
    from ssmc.runtime.models.families import Architecture

POWER = "power-of-two"
TWICE, EXPAND, HEADS, ANY = "twice", "expand", "heads", "any"
"""What a d_inner must be: 2 x d_model; a whole multiple of d_model; any whole number of heads; anything."""

STRIDE = 8  # channels that causal_conv1d reads at once
EPSILON = 1e-5  # of norms, where software has no other


@dataclass(frozen=True)
class Rule:
    """What a consumer takes of one kind of mixers.

    Attributes:
        states: a number that d_state is a multiple of, or POWER where others are padded to one.
        padded: whether other numbers of states are padded, and not refused.
        width: what d_inner must be.
        strides: whether the convolution's channels must be a multiple of STRIDE.
        fixed_epsilon: whether its norms always use EPSILON.
        gain: what gets faster.
    """

    states: int | str = 1
    padded: bool = False
    width: str = ANY
    strides: bool = False
    fixed_epsilon: bool = False
    gain: str = ""


@dataclass(frozen=True)
class Consumer:
    """Software that runs exports.

    Attributes:
        name: as the user names it.
        format: the export it reads.
        options: of that format.
        channels: what it takes of mixers without heads, as in Mamba-1.
        heads: what it takes of mixers with heads, as in Mamba-2.
    """

    name: str
    format: str
    channels: Rule
    heads: Rule
    options: Mapping[str, Any] = field(default_factory=dict)

    def rule(self, sizes: Dimensions) -> Rule:
        """What it takes of a model of these sizes."""
        return self.channels if sizes.heads is None else self.heads


_BYTES = "fewer states and channels make prefill and decode faster"
_ANY = Rule(gain=_BYTES)
_WHOLE = Rule(width=EXPAND, gain=_BYTES)
_TRITON = Rule(POWER, padded=True, gain="fewer states make prefill faster, a smaller power of two of them decode")
_TRITON_HEADS = Rule(POWER, True, EXPAND, strides=True, gain="a smaller power of two of states makes decode faster")
_LOOP = Rule(width=TWICE, gain="fewer states make prefill and decode faster: its scan is a loop over them")
_STEPS = Rule(32, True, HEADS, gain="fewer states, in steps of 32, and fewer heads make prefill and decode faster")
_LOSES = Rule(32, width=EXPAND, gain=_BYTES)

CONSUMERS = {
    consumer.name: consumer
    for consumer in (
        Consumer("transformers", "safetensors", _ANY, _WHOLE),
        Consumer("vllm", "safetensors", _TRITON, _TRITON_HEADS),
        Consumer("mamba-ssm", "mamba-ssm", _TRITON, _TRITON_HEADS),
        Consumer("llama.cpp", "gguf", _LOOP, _STEPS),
        Consumer("mlx-lm", "safetensors", Rule(fixed_epsilon=True, gain=_BYTES), _LOSES),
        Consumer("onnxruntime", "onnx", _ANY, _WHOLE),
        Consumer("genai", "onnx", _ANY, _WHOLE, {"target": "genai"}),
        Consumer("openvino", "onnx", _ANY, _WHOLE),
    )
}
"""By the name `--for` takes."""


def consumer_named(name: str) -> Consumer:
    """The consumer of a name.

    Raises:
        UsageError: naming those there are.
    """
    if name not in CONSUMERS:
        raise UsageError(f"There is no runtime {name!r} to fit a model to; there are {', '.join(CONSUMERS)}.")
    return CONSUMERS[name]


def refuse_family(name: str, architecture: Architecture) -> None:
    """Refuse a family that a consumer has no model of.

    Raises:
        UsageError: naming consumers that have one.
    """
    if consumer_named(name).name in architecture.capabilities.unknown_to:
        able = ", ".join(other for other in CONSUMERS if other not in architecture.capabilities.unknown_to)
        raise UsageError(
            f"{name} runs no models of the family {architecture.model_type}. Leave out --for, or choose one of {able}."
        )


def computes_otherwise(
    name: str, architecture: Architecture, config: Any, wrong: bool, version: str = ""
) -> str | None:
    """What a consumer silently computes otherwise of a model; None where nothing.

    Args:
        name: of the consumer.
        architecture: of the model.
        config: of the model.
        wrong: look for what makes results useless, or for what hardly changes them.
        version: of the consumer; without, what only some releases do is left out.
    """
    found = _known(name, architecture, config, version)
    return "; ".join(other.what for other in found if other.wrong == wrong and not other.refused) or None


def refuses(name: str, architecture: Architecture, config: Any, version: str) -> str | None:
    """Why a release of a consumer loads no model of a family; None where that is not known of it."""
    return "; ".join(other.what for other in _known(name, architecture, config, version) if other.refused) or None


def _known(name: str, architecture: Architecture, config: Any, version: str) -> list[Otherwise]:
    """What is known of a release of a consumer."""
    found = architecture.otherwise(config)
    return [other for other in found if other.consumer == name and version.startswith(other.release)]


def misfit(name: str, sizes: Dimensions, epsilon: float | None = None) -> str | None:
    """Why a consumer does not run an export of these sizes, or runs it wrongly; None where it runs it.

    Args:
        name: of the consumer.
        sizes: of the export.
        epsilon: of its norms, where that is known.
    """
    rule = consumer_named(name).rule(sizes)
    if isinstance(rule.states, int) and not rule.padded and sizes.d_state % rule.states:
        kernel = f"its kernel for a GPU takes states in multiples of {rule.states} and silently loses others"
        return f"{kernel}, here are {sizes.d_state}"
    channels = sizes.d_inner + 2 * sizes.groups * sizes.d_state
    if rule.strides and channels % STRIDE:
        return f"causal_conv1d wants a multiple of {STRIDE} channels, here are {channels}"
    return lasting_misfit(name, sizes, epsilon)


def lasting_misfit(name: str, sizes: Dimensions, epsilon: float | None = None) -> str | None:
    """As `misfit`, of what removing states does not change."""
    rule = consumer_named(name).rule(sizes)
    wide = {TWICE: 2 * sizes.d_model, EXPAND: sizes.d_model * (sizes.d_inner // sizes.d_model)}.get(rule.width)
    hybrid = hasattr(sizes, "mamba_layers")  # where the width has a key of its own
    if wide is not None and sizes.d_inner != wide and not (hybrid and rule.width == EXPAND):
        wanted = "2 x d_model" if rule.width == TWICE else "a whole multiple of d_model"
        return f"d_inner must be {wanted}, here it is {sizes.d_inner} and d_model {sizes.d_model}"
    if rule.fixed_epsilon and epsilon is not None and epsilon != EPSILON:
        return f"its norms always use the epsilon {EPSILON}, this model's is {epsilon}: silently wrong results"
    return None
