"""A language model as one ONNX graph with explicit states, built from its tensors.

One graph serves prefill, a prompt in pieces, and decoding: it takes tokens and the states before them and gives logits
and the states after them. `states` of the layer writers says how the states lie.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import GraphBuilder, OpBuilder

from ssmc.exporters.onnx.family import Block, GraphFamily, Stack
from ssmc.exporters.onnx.layers import GENAI, LAYERS, ORT, PORTABLE
from ssmc.exporters.onnx.ops.codes import FLOAT32, INT8, MICROSOFT, Codes
from ssmc.exporters.onnx.ops.padding import Tokens, chosen_rows, real_first
from ssmc.exporters.onnx.ops.parts import END
from ssmc.exporters.onnx.ops.states import Kind, kept, packed, unpacked
from ssmc.exporters.onnx.ops.weights import Weights
from ssmc.runtime.errors import CheckpointError
from ssmc.runtime.models.generation.onnx_names import (
    GROWS,
    PAST,
    PAST_GENAI,
    STATES_GENAI,
    TOTAL,
    present_name,
)
from ssmc.runtime.quantized import Quantized

OPSET = 23  # the first with RMSNormalization
IR_VERSION = 11  # the one that came with it
DTYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16}


@dataclass(frozen=True)
class Settings:
    """What a graph is to be.

    Attributes:
        dtype: of embedding and matrix products, "float32" or "float16"; everything between them is float32.
        logits: "last": of the last real token of every row, (B, 1, V); "all": of every token, (B, L, V).
        target: "portable": standard operators only; "ort": those of onnxruntime too, where a family has a use for them;
            "genai": portable with the names of inputs and outputs that onnxruntime-genai looks for.
        own_head: store the head (d_model, V) on its own even where it is tied to the embedding, as quantisation needs.
        state_dtype: of the SSM states between calls, "float32", "float16" or "int8"; see `ops.states`.
        rounds_inputs: let products with codes round what they read to 8 bits.
    """

    dtype: str = "float32"
    logits: str = "last"
    target: str = "portable"
    own_head: bool = False
    state_dtype: str = "float32"
    rounds_inputs: bool = False


@dataclass(frozen=True)
class Built:
    """A model as a graph, its weights not copied yet."""

    model: ir.Model
    layers: tuple[dict[str, int], ...]  # sizes of every layer, as its module names them


_LACKING = {
    ORT: "operators of onnxruntime's own were not measured to help there",
    GENAI: "its states have no names that onnxruntime-genai looks for",
}
"""Why a family has no graph of a target."""


def require_family(config: Any, target: str = PORTABLE) -> GraphFamily:
    """What writes the graph of a family; one that has no graph, or none of this target, is refused.

    Raises:
        CheckpointError: naming what there is.
    """
    found = LAYERS.find(config.model_type)
    family = found if found is None or isinstance(found, GraphFamily) else Stack(found)
    if family is None:
        raise CheckpointError(
            f"There is no ONNX graph for models of type {config.model_type!r}, only for {', '.join(LAYERS.names())}. "
            "Export to another format."
        )
    if target not in family.TARGETS:
        raise CheckpointError(
            f"There is no ONNX graph of target {target!r} for models of type {config.model_type!r}: "
            f"{_LACKING[target]}. Use the target {' or '.join(family.TARGETS)}."
        )
    family.check(config)
    return family


def build(
    config: Any,
    tensors: Mapping[str, torch.Tensor],
    settings: Settings,
    codes: Mapping[str, Quantized] = MappingProxyType({}),
) -> Built:
    """Write a model as a graph.

    Inputs: `input_ids` and `attention_mask` (B, L) int64, the mask 1 at real tokens and 0 at padding, which may stand
    anywhere; and the states of every layer, `past_*_i`, zeros at the beginning, or of length 0 where they grow (keys,
    values and `past_mask`). For genai the mask is one of all tokens so far, in place of `past_mask`. Outputs: `logits`
    float32 and the states after the last real token, `present_*_i`, laid out as their pasts.

    Args:
        config: transformers' configuration.
        tensors: by transformers' names, no tied head. Sizes are read from them: every layer may have its own.
        settings: see there.
        codes: weights that are written in few bits, by their names.

    Raises:
        CheckpointError: there is no graph for this family and target.
    """
    family = require_family(config, settings.target)
    plain, tensors = tensors, family.folded(config, tensors)
    codes = _folded(family, config, plain, codes)
    imports = {"": OPSET} | ({MICROSOFT: 1} if settings.target == ORT or codes else {})
    graph = ir.Graph([], [], nodes=[], opset_imports=imports, name=config.model_type)
    builder = GraphBuilder(graph)
    few_bits = Codes(builder, codes, INT8 if settings.rounds_inputs else FLOAT32)
    op, weights = builder.op, Weights(builder, tensors, DTYPES[settings.dtype], few_bits)
    input_ids = builder.input("input_ids", ir.DataType.INT64, ["batch", "length"])
    genai = settings.target == GENAI
    attention_mask = builder.input("attention_mask", ir.DataType.INT64, ["batch", "total" if genai else "length"])
    layers = tuple(family.sizes(config, tensors, layer) for layer in range(config.num_hidden_layers))
    kinds = _states(family, config, layers, settings)
    pasts = {name: builder.input(name, dtype, ["batch", *shape]) for name, (shape, dtype) in kinds.items()}
    tokens = real_first(op, input_ids, _of_these(op, attention_mask, input_ids) if genai else attention_mask)
    tokens = replace(tokens, kept_as_given=genai)
    hidden = _scaled(op, weights.rows(op, family.embedding, tokens.ids), family.embedding_scale(config))  # (L, B, d)
    common = {state: pasts[PAST + state] for state in family.common_states(config) if not genai}
    if genai and family.common_states(config):  # which is the mask of the cache; genai gives that of all tokens
        common["mask"] = op.Cast(_before_these(op, attention_mask, input_ids), to=ir.DataType.FLOAT)
    shared, after = family.shared(op, config, input_ids, tokens, common, hidden)
    presents = {} if genai else {PAST + state: value for state, value in after.items()}
    for layer, sizes in enumerate(layers):
        builder.push_module(f"layer_{layer}")
        shapes = family.states(sizes)
        names = {state: past_name(state, layer, settings.target) for state in kept(shapes, sizes, settings.state_dtype)}
        past = unpacked(op, {state: pasts[name] for state, name in names.items()}, sizes, settings.state_dtype)
        block = Block(layer, weights, past, tokens, config, settings.target, shared)
        hidden, present = family.block(op, block, hidden)
        present = packed(op, present, shapes, sizes, settings.state_dtype)
        presents |= {names[state]: value for state, value in present.items()}
        builder.pop_module()
    builder.add_output(_head(op, weights, hidden, tokens, config, settings, family), "logits")
    for name in kinds:
        builder.add_output(presents[name], present_name(name))
    _name_shapes(graph, config, settings, kinds)
    return Built(ir.Model(graph, ir_version=IR_VERSION), layers)


def _states(
    family: GraphFamily, config: Any, layers: tuple[dict[str, int], ...], settings: Settings
) -> dict[str, Kind]:
    """Shapes, without the batch, and types of all states, by the names of their inputs, in the order of the inputs."""
    common = family.common_states(config).items()
    kinds: dict[str, Kind] = {PAST + state: (tuple(shape), ir.DataType.FLOAT) for state, shape in common}
    kinds = {} if settings.target == GENAI else kinds
    for layer, sizes in enumerate(layers):
        own = kept(family.states(sizes), sizes, settings.state_dtype)
        kinds |= {past_name(state, layer, settings.target): kind for state, kind in own.items()}
    return kinds


def _scaled(op: OpBuilder, x: ir.Value, factor: float) -> ir.Value:
    return x if factor == 1.0 else op.Mul(x, factor)


def _folded(
    family: GraphFamily, config: Any, tensors: Mapping[str, torch.Tensor], codes: Mapping[str, Quantized]
) -> dict[str, Quantized]:
    """Codes with the constant factors in their scales that the family multiplies into their weights."""
    scales = {name: code.expanded_scale() for name, code in codes.items()}
    changed = family.folded(config, {**tensors, **scales})
    return {
        name: replace(code, scale=changed[name].float()[:, :: code.shape.group].contiguous())
        for name, code in codes.items()
    }


def past_name(state: str, layer: int, target: str = PORTABLE) -> str:
    """The input for a state of a layer; onnxruntime-genai finds states by names of its own."""
    return f"{PAST_GENAI}{layer}.{STATES_GENAI[state]}" if target == GENAI else f"{PAST}{state}_{layer}"


def _of_these(op: OpBuilder, mask: ir.Value, input_ids: ir.Value) -> ir.Value:
    """What a mask (B, all tokens so far) says of the (B, L) tokens that come now."""
    return op.Slice(mask, op.Neg(op.Shape(input_ids, start=1, end=2)), [END], [1])


def _before_these(op: OpBuilder, mask: ir.Value, input_ids: ir.Value) -> ir.Value:
    """What the same mask says of the tokens that came before."""
    return op.Slice(mask, [0], op.Neg(op.Shape(input_ids, start=1, end=2)), [1])


def _head(
    op: OpBuilder,
    weights: Weights,
    hidden: ir.Value,
    tokens: Tokens,
    config: Any,
    settings: Settings,
    family: GraphFamily,
) -> ir.Value:
    """Logits (B, 1, V) or (B, L, V) from the last layer's output (L, B, d_model)."""
    rows = chosen_rows(op, tokens, settings.logits)  # chosen before the head, which is the largest product
    hidden = op.Gather(op.Reshape(hidden, [-1, config.hidden_size]), rows, axis=0)  # (B, 1 or L, d_model)
    normed = family.norm(op, weights, family.final_norm, hidden, config)
    tied = family.head not in weights
    matrix = family.embedding if tied else family.head
    logits = weights.head(op, matrix, normed, shared=tied and not settings.own_head)
    return _scaled(op, logits, family.logits_scale(config))


def _name_shapes(graph: ir.Graph, config: Any, settings: Settings, states: Mapping[str, Kind]) -> None:
    """Give the outputs the names of their dimensions, which shape inference cannot know."""
    length = 1 if settings.logits == "last" else "length"
    kinds: dict[str, Kind] = {"logits": ((length, config.vocab_size), ir.DataType.FLOAT)}
    for name, (shape, dtype) in states.items():
        kinds[present_name(name)] = (tuple(TOTAL if size == GROWS else size for size in shape), dtype)
    for output in graph.outputs:
        shape, dtype = kinds[output.name]
        output.shape, output.type = ir.Shape(["batch", *shape]), ir.TensorType(dtype)
