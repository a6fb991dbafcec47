"""A language model as one ONNX graph with explicit states, built from its tensors.

One graph serves prefill, a prompt in pieces, and decoding: it takes tokens and the states before them and gives logits
and the states after them. `states` of the layer writers says how the states lie.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import GraphBuilder, OpBuilder

from ssmc.exporters.onnx.layers import GENAI, LAYERS, ORT, PORTABLE, GraphLayer
from ssmc.exporters.onnx.ops.padding import Tokens, chosen_rows, real_first
from ssmc.exporters.onnx.ops.parts import END, Layer
from ssmc.exporters.onnx.ops.ssd import MICROSOFT
from ssmc.exporters.onnx.ops.weights import Weights
from ssmc.runtime.errors import CheckpointError
from ssmc.runtime.models.generation.onnx_names import PAST, PAST_GENAI, STATES_GENAI, present_name

OPSET = 23  # the first with RMSNormalization
IR_VERSION = 11  # the one that came with it
DTYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16}
EMBEDDING, FINAL_NORM, HEAD = "backbone.embeddings.weight", "backbone.norm_f.weight", "lm_head.weight"


@dataclass(frozen=True)
class Settings:
    """What a graph is to be.

    Attributes:
        dtype: of embedding and matrix products, "float32" or "float16"; everything between them is float32.
        logits: "last": of the last real token of every row, (B, 1, V); "all": of every token, (B, L, V).
        target: "portable": standard operators only; "ort": those of onnxruntime too, where a family has a use for them;
            "genai": portable with the names of inputs and outputs that onnxruntime-genai looks for.
        own_head: store the head (d_model, V) on its own even where it is tied to the embedding, as quantisation needs.
    """

    dtype: str = "float32"
    logits: str = "last"
    target: str = "portable"
    own_head: bool = False


@dataclass(frozen=True)
class Built:
    """A model as a graph, its weights not copied yet."""

    model: ir.Model
    layers: tuple[dict[str, int], ...]  # sizes of every layer, as its module names them


def require_family(config: Any, target: str = PORTABLE) -> GraphLayer:
    """What writes the layers of a family; one that has no graph, or none of this target, is refused.

    Raises:
        CheckpointError: naming what there is.
    """
    family = LAYERS.find(config.model_type)
    if family is None:
        raise CheckpointError(
            f"There is no ONNX graph for models of type {config.model_type!r}, only for {', '.join(LAYERS.names())}. "
            "Export to another format."
        )
    if target not in family.TARGETS:
        raise CheckpointError(
            f"There is no ONNX graph of target {target!r} for models of type {config.model_type!r}: operators of "
            f"onnxruntime's own were not measured to help there. Use the target {' or '.join(family.TARGETS)}."
        )
    return family


def build(config: Any, tensors: Mapping[str, torch.Tensor], settings: Settings) -> Built:
    """Write a model as a graph.

    Inputs: `input_ids` and `attention_mask` (B, L) int64, the mask 1 at real tokens and 0 at padding, which may stand
    anywhere; and the states of every layer, `past_*_i`, zeros at the beginning. Outputs: `logits` float32 and the
    states after the last real token, `present_*_i`, laid out as their pasts.

    Args:
        config: transformers' configuration.
        tensors: by transformers' names, no tied head. Sizes are read from them: every layer may have its own.
        settings: see there.

    Raises:
        CheckpointError: there is no graph for this family and target.
    """
    family = require_family(config, settings.target)
    if config.hidden_act not in ("silu", "swish"):
        raise CheckpointError(
            f"The ONNX graph has silu as activation, this model's is {config.hidden_act}. Export to another format."
        )
    imports = {"": OPSET} | ({MICROSOFT: 1} if settings.target == ORT else {})
    graph = ir.Graph([], [], nodes=[], opset_imports=imports, name=config.model_type)
    builder = GraphBuilder(graph)
    op, weights = builder.op, Weights(builder, tensors, DTYPES[settings.dtype])
    input_ids = builder.input("input_ids", ir.DataType.INT64, ["batch", "length"])
    genai = settings.target == GENAI
    attention_mask = builder.input("attention_mask", ir.DataType.INT64, ["batch", "total" if genai else "length"])
    layers = tuple(family.sizes(config, tensors, layer) for layer in range(config.num_hidden_layers))
    pasts = [
        {
            name: builder.input(past_name(name, layer, settings.target), ir.DataType.FLOAT, ["batch", *shape])
            for name, shape in family.states(sizes).items()
        }
        for layer, sizes in enumerate(layers)
    ]
    tokens = real_first(op, input_ids, _of_these(op, attention_mask, input_ids) if genai else attention_mask)
    hidden = weights.rows(op, EMBEDDING, tokens.ids)  # (L, B, d_model)
    presents = []
    for layer, past in enumerate(pasts):
        builder.push_module(f"layer_{layer}")
        prefix = f"backbone.layers.{layer}."
        normed = _norm(op, weights, prefix + "norm.weight", hidden, config)
        this = Layer(weights, prefix + "mixer.", past, tokens, config, settings.target)
        change, present = family.mixer(op, this, normed)
        hidden = op.Add(hidden, change)
        presents.append(present)
        builder.pop_module()
    builder.add_output(_head(op, weights, hidden, tokens, config, settings), "logits")
    for layer, present in enumerate(presents):
        for name, state in present.items():
            builder.add_output(state, present_name(past_name(name, layer, settings.target)))
    _name_shapes(graph, config, settings, family, layers)
    return Built(ir.Model(graph, ir_version=IR_VERSION), layers)


def past_name(state: str, layer: int, target: str = PORTABLE) -> str:
    """The input for a state of a layer; onnxruntime-genai finds states by names of its own."""
    return f"{PAST_GENAI}{layer}.{STATES_GENAI[state]}" if target == GENAI else f"{PAST}{state}_{layer}"


def _of_these(op: OpBuilder, mask: ir.Value, input_ids: ir.Value) -> ir.Value:
    """What a mask (B, all tokens so far) says of the (B, L) tokens that come now."""
    return op.Slice(mask, op.Neg(op.Shape(input_ids, start=1, end=2)), [END], [1])


def _norm(op: OpBuilder, weights: Weights, name: str, hidden: ir.Value, config: Any) -> ir.Value:
    return op.RMSNormalization(hidden, weights.float32(name), axis=-1, epsilon=float(config.layer_norm_epsilon))


def _head(
    op: OpBuilder, weights: Weights, hidden: ir.Value, tokens: Tokens, config: Any, settings: Settings
) -> ir.Value:
    """Logits (B, 1, V) or (B, L, V) from the last layer's output (L, B, d_model)."""
    rows = chosen_rows(op, tokens, settings.logits)  # chosen before the head, which is the largest product
    hidden = op.Gather(op.Reshape(hidden, [-1, config.hidden_size]), rows, axis=0)  # (B, 1 or L, d_model)
    normed = _norm(op, weights, FINAL_NORM, hidden, config)
    tied = HEAD not in weights
    return weights.head(op, EMBEDDING if tied else HEAD, normed, shared=tied and not settings.own_head)


def _name_shapes(
    graph: ir.Graph, config: Any, settings: Settings, family: GraphLayer, layers: tuple[dict[str, int], ...]
) -> None:
    """Give the outputs the names of their dimensions, which shape inference cannot know."""
    length = 1 if settings.logits == "last" else "length"
    shapes = {"logits": ["batch", length, config.vocab_size]}
    for layer, sizes in enumerate(layers):
        for name, shape in family.states(sizes).items():
            shapes[present_name(past_name(name, layer, settings.target))] = ["batch", *shape]
    for output in graph.outputs:
        output.shape = ir.Shape(shapes[output.name])
        output.type = ir.TensorType(ir.DataType.FLOAT)
