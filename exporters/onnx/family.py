"""What a graph of a family is made of beside its mixers: names, norms, blocks, and what blocks share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import OpBuilder

from ssmc.exporters.onnx.layers import GraphLayer
from ssmc.exporters.onnx.ops.padding import Tokens
from ssmc.exporters.onnx.ops.parts import Layer
from ssmc.exporters.onnx.ops.weights import Weights
from ssmc.runtime.errors import CheckpointError

Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class Block:
    """What a block is written from.

    Attributes:
        index: its number.
        weights: of the model.
        past: its states before the tokens, by name.
        tokens: which of them are real.
        config: transformers' configuration.
        target: of the graph.
        shared: what the family's `shared` made.
    """

    index: int
    weights: Weights
    past: Mapping[str, ir.Value]
    tokens: Tokens
    config: Any
    target: str
    shared: Any = None


class GraphFamily:
    """A family of models as graphs; a subclass says what differs from a stack of mixers.

    Attributes:
        TARGETS: those it knows.
        embedding, final_norm, head: names of tensors.
    """

    TARGETS: tuple[str, ...] = ()
    embedding, final_norm, head = "backbone.embeddings.weight", "backbone.norm_f.weight", "lm_head.weight"

    def check(self, config: Any) -> None:
        """Refuse what the graph cannot express.

        Raises:
            CheckpointError: with the reason.
        """
        if config.hidden_act not in ("silu", "swish"):
            raise CheckpointError(
                f"The ONNX graph has silu as activation, this model's is {config.hidden_act}. Export to another format."
            )

    def epsilon(self, config: Any) -> float:
        """Of the norms."""
        return float(config.layer_norm_epsilon)

    def folded(self, config: Any, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """The tensors with constant factors multiplied in, so that the graph needs no operators for them."""
        return tensors

    def embedding_scale(self, config: Any) -> float:
        """What embeddings are multiplied by."""
        return 1.0

    def logits_scale(self, config: Any) -> float:
        """What logits are multiplied by."""
        return 1.0

    def sizes(self, config: Any, tensors: Mapping[str, torch.Tensor], layer: int) -> dict[str, int]:
        """The sizes of a layer, read from its own tensors."""
        raise NotImplementedError

    def states(self, sizes: Mapping[str, int]) -> Mapping[str, Shape]:
        """The states of a layer of these sizes, without the batch, by name; one axis may have a name: it grows."""
        raise NotImplementedError

    def common_states(self, config: Any) -> Mapping[str, Shape]:
        """States of the whole model."""
        return {}

    def shared(
        self,
        op: OpBuilder,
        config: Any,
        input_ids: ir.Value,
        tokens: Tokens,
        past: Mapping[str, ir.Value],
        hidden: ir.Value,
    ) -> tuple[Any, dict[str, ir.Value]]:
        """What all blocks read beside `hidden`, what the first does, and the states of the whole model afterwards."""
        return None, {}

    def block(self, op: OpBuilder, block: Block, hidden: ir.Value) -> tuple[ir.Value, dict[str, ir.Value]]:
        """What a block puts out for (L, B, d_model), and its states behind the last real token."""
        raise NotImplementedError

    def norm(self, op: OpBuilder, weights: Weights, name: str, hidden: ir.Value, config: Any) -> ir.Value:
        """RMSNorm over the last axis."""
        return op.RMSNormalization(hidden, weights.float32(name), axis=-1, epsilon=self.epsilon(config))


class Stack(GraphFamily):
    """A stack of mixers, as Mamba and Mamba-2 are; what writes a mixer is registered as a `GraphLayer`."""

    def __init__(self, layer: GraphLayer):
        """Of the mixers."""
        self._layer = layer
        self.TARGETS = layer.TARGETS

    def sizes(self, config: Any, tensors: Mapping[str, torch.Tensor], layer: int) -> dict[str, int]:
        """Of the mixer."""
        return self._layer.sizes(config, tensors, layer)

    def states(self, sizes: Mapping[str, int]) -> Mapping[str, Shape]:
        """Of the mixer."""
        return self._layer.states(sizes)

    def block(self, op: OpBuilder, block: Block, hidden: ir.Value) -> tuple[ir.Value, dict[str, ir.Value]]:
        """Norm and mixer."""
        prefix = f"backbone.layers.{block.index}."
        normed = self.norm(op, block.weights, prefix + "norm.weight", hidden, block.config)
        this = Layer(block.weights, prefix + "mixer.", block.past, block.tokens, block.config, block.target)
        change, present = self._layer.mixer(op, this, normed)
        return op.Add(hidden, change), present
