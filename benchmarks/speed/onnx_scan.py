"""Mamba-2's scan alone in onnxruntime: chunks of matrix products in standard operators beside its LinearAttention.

    python -m benchmarks.speed.onnx_scan --json benchmarks/results/onnx_scan.json

130M shapes (24 heads of 64 channels, 128 states, one group) and random inputs, time steps and rates drawn as Mamba-2
initialises them. Both read and give what the graph of a layer hands them, (L, B, ...), the skip included; for one token
"chunks" is the step in standard operators. They take turns on one thread; its processor time counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from onnxscript import GraphBuilder, OpBuilder

from benchmarks.reporting import as_json, print_conditions, print_timings, write_json
from ssmc.exporters.onnx.ops import ssd
from ssmc.exporters.onnx.ops.ssd import Heads, Inputs
from ssmc.runtime.measure.timing import Timing

HEADS = Heads(heads=24, head_dim=64, d_state=128, groups=1)
Scan = Callable[[OpBuilder, Inputs, ir.Value], tuple[ir.Value, ir.Value]]


def chunks(op: OpBuilder, inputs: Inputs, past: ir.Value) -> tuple[ir.Value, ir.Value]:
    divided = ssd.chunks_of(op, inputs.u)
    widths = (HEADS.d_inner, HEADS.heads, HEADS.d_state, HEADS.d_state)
    sequences = zip((inputs.u, inputs.dt, inputs.B, inputs.C), widths, strict=True)
    filled = [op.Concat(x, divided.zeros(op, op.Shape(x, start=1, end=2), width), axis=0) for x, width in sequences]
    return ssd.chunked(op, HEADS, divided, Inputs(*filled, inputs.A, inputs.D), past)


def batch_first(scan: Callable[..., tuple[ir.Value, ir.Value]]) -> Scan:
    def turned(op: OpBuilder, inputs: Inputs, past: ir.Value) -> tuple[ir.Value, ir.Value]:
        turn = [op.Transpose(x, perm=[1, 0, 2]) for x in (inputs.u, inputs.dt, inputs.B, inputs.C)]
        y, h = scan(op, HEADS, Inputs(*turn, inputs.A, inputs.D), past)
        return op.Transpose(y, perm=[1, 0, 2]), h

    return turned


def open_scan(scan: Scan) -> onnxruntime.InferenceSession:
    imports = {"": 23, ssd.MICROSOFT: 1}
    graph = ir.Graph([], [], nodes=[], opset_imports=imports, name="scan")
    builder, float32 = GraphBuilder(graph), ir.DataType.FLOAT
    widths = {"u": HEADS.d_inner, "dt": HEADS.heads, "B": HEADS.d_state, "C": HEADS.d_state}
    sequences = [builder.input(name, float32, ["length", "batch", width]) for name, width in widths.items()]
    A, D = builder.input("A", float32, [HEADS.heads]), builder.input("D", float32, [HEADS.heads, 1, 1])
    past = builder.input("past", float32, ["batch", HEADS.heads, HEADS.d_state, HEADS.head_dim])
    for name, output in zip(("y", "h"), scan(builder.op, Inputs(*sequences, A, D), past), strict=True):
        output.type = ir.TensorType(float32)
        builder.add_output(output, name)
    model = ir.to_proto(ir.Model(graph, ir_version=11))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def draw(length: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    shapes = {"u": HEADS.d_inner, "B": HEADS.d_state, "C": HEADS.d_state}
    sequences = {name: draw.standard_normal((length, 1, width)) for name, width in shapes.items()}
    steps = np.exp(draw.uniform(np.log(0.001), np.log(0.1), (1, 1, HEADS.heads)))
    sequences["dt"] = steps * np.exp(0.3 * draw.standard_normal((length, 1, HEADS.heads)))
    sequences["A"], sequences["D"] = -np.arange(1.0, HEADS.heads + 1), np.ones((HEADS.heads, 1, 1))
    sequences["past"] = draw.standard_normal((1, HEADS.heads, HEADS.d_state, HEADS.head_dim))
    return {name: x.astype(np.float32) for name, x in sequences.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 2, 16, 64, 128, 512, 2048])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    now = print_conditions()
    print(f"processor time of one thread, onnxruntime {onnxruntime.__version__}\n")
    many = {"chunks": open_scan(chunks), "LinearAttention": open_scan(batch_first(ssd.linear_attention))}
    one = many | {"chunks": open_scan(batch_first(ssd.step))}
    results = {}
    for length in args.lengths:
        sessions, given = one if length == 1 else many, draw(length)
        found = {name: session.run(None, given) for name, session in sessions.items()}
        for ours, theirs in zip(*found.values(), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4 * np.abs(theirs).max())
        samples: dict[str, list[float]] = {name: [] for name in sessions}
        for _ in range(args.repeats * (20 if length < 64 else 1)):
            for name, session in sessions.items():
                begin = time.process_time()
                session.run(None, given)
                samples[name].append(time.process_time() - begin)
        timings = {name: Timing(tuple(seconds)) for name, seconds in samples.items()}
        print_timings(f"{length} tokens", timings, "chunks")
        results[str(length)] = as_json(timings, "chunks")
    settings = {"repeats": args.repeats, "onnxruntime": onnxruntime.__version__}
    write_json(args.json, now, settings, results)


if __name__ == "__main__":
    main()
