"""int8 weights by onnxruntime's own dynamic quantisation, and one int8 table for a tied embedding and head.

Only the large products are quantised, of mixers, attention, MLPs and the head, one scale per output. Their inputs are
quantised at run time. x_proj and dt_proj (Mamba-1's), the convolution and the scan are a small part of the weights:
they stay float32.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxscript import TapeBuilder

from ssmc.exporters.onnx.files import GRAPH

QUANTIZED: tuple[str, ...] = (
    "in_proj",
    "out_proj",
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
)  # parts of the names of the matrices
QUANTIZED += ("up_proj", "gate_proj", "down_proj", "input_linear", "output_linear")
SUFFIXES = ("_quantized", "_scale", "_zero_point")  # that onnxruntime gives the three tensors of a matrix


def quantize_int8(
    source: Path, target: Path, tables: tuple[str, str], weight_type: QuantType = QuantType.QInt8
) -> ir.Model:
    """Quantise the graph in one folder and keep the result in another.

    Args:
        source: holds a float32 graph that has its head as a matrix of its own.
        target: exists; the model that is returned reads its weights from there.
        tables: names of embedding and head.
        weight_type: of onnxruntime.

    Returns:
        The quantised model, with standard operators only.
    """
    graph = onnx.load(source / GRAPH, load_external_data=False).graph
    nodes = [
        n.name for n in graph.node if n.op_type == "MatMul" and any(p in n.input[1] for p in (*QUANTIZED, *tables))
    ]
    with _quiet():
        quantize_dynamic(
            source / GRAPH,
            target / GRAPH,
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=nodes,
            per_channel=True,
            reduce_range=True,  # 7 bits: CPUs without VNNI add pairs of products in 16 bits, which 8 would overflow
            weight_type=weight_type,
            use_external_data_format=True,
        )
    model = ir.load(target / GRAPH)
    model.graph.sort()  # onnxruntime's own order forgets what the branches of an If read
    _share_table(model.graph, tables[0])
    return model


def _share_table(graph: ir.Graph, embedding: str) -> None:
    """Let a tied embedding read columns of the head's int8 matrix (d, V) instead of a float32 table of its own."""
    values = graph.initializers
    table, scales, zeros = (values.get(f"{embedding}.t{suffix}") for suffix in SUFFIXES)
    if table is None:  # the head is not tied
        return
    (gather,) = (node for node in graph if node.op_type == "Gather" and node.inputs[0].name == embedding)
    ids, op = gather.inputs[1], TapeBuilder()
    float32 = int(ir.DataType.FLOAT)
    columns = op.Cast(op.Gather(table, ids, axis=1), to=float32)  # (d, L, B)
    zero = op.Cast(op.Gather(zeros, ids, axis=0), to=float32)  # (L, B)
    rows = op.Transpose(op.Mul(op.Sub(columns, zero), op.Gather(scales, ids, axis=0)), perm=[1, 2, 0])
    ir.convenience.replace_nodes_and_values(graph, gather, [gather], op.nodes, gather.outputs, [rows])
    values.pop(embedding)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep onnxruntime's advice on pre-processing, which does not apply to this graph, to itself."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
