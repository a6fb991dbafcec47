"""The logits of every token from a graph that gives those of the last one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssmc.runtime.errors import CheckpointError

if TYPE_CHECKING:
    import onnx

# Values that the exporter gives these names for this purpose.
CHOSEN_ROWS = "chosen_rows"  # which rows of (L B, d_model) the head reads
PLACE, BATCH, ROW = "token_place", "batch_size", "batch_row"  # see exporters/onnx/padding.py


def give_all_logits(model: onnx.ModelProto) -> onnx.ModelProto:
    """Let the head read all tokens, in the order they were given: logits (B, L, V). Changes the graph in place.

    Raises:
        CheckpointError: it is no graph that ssmc wrote.
    """
    from onnx import helper

    graph = model.graph
    (logits,) = (output for output in graph.output if output.name == "logits")
    shape = logits.type.tensor_type.shape
    if shape.dim[1].dim_param == "length":  # it does already
        return model
    heads = [index for index, node in enumerate(graph.node) if CHOSEN_ROWS in node.input]
    if len(heads) != 1:
        raise CheckpointError("The graph gives the last token's logits only, and it is not one of ssmc. Export again.")
    rows = [
        helper.make_node("Mul", [PLACE, BATCH], ["all_rows_scaled"]),
        helper.make_node("Add", ["all_rows_scaled", ROW], ["all_rows_by_time"]),  # (L, B)
        helper.make_node("Transpose", ["all_rows_by_time"], ["all_rows"], perm=[1, 0]),
    ]
    head = graph.node[heads[0]]
    head.input[list(head.input).index(CHOSEN_ROWS)] = "all_rows"
    nodes = [*graph.node[: heads[0]], *rows, *graph.node[heads[0] :]]
    del graph.node[:]
    graph.node.extend(nodes)
    shape.dim[1].dim_param = "length"
    return model
