"""Codes of 4 and 8 bits beside onnxruntime's own int8, on a CPU, at Mamba-130M shapes: size, prefill and decode.

    python -m benchmarks.speed.onnx_codes --graphs FOLDER --only-graphs  # write them first, on a busy machine
    python -m benchmarks.speed.onnx_codes --graphs FOLDER --json benchmarks/results/onnx_codes.json

Random weights, which cost the same time as trained ones. "onnx" is the float32 graph, "int8" that of
`ssmc export --quantize int8`; "w4" and "w8" have the codes of `ssmc compress --quantize --quantize-embedding` in groups
of 128 as MatMulNBits, with inputs in float32 or, behind a plus sign, in int8 (`--activations int8`). All take turns,
with as many threads as torch has.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from benchmarks.reporting import as_json, print_conditions, print_timings, write_json
from benchmarks.speed.onnx_speed import STEPS, add_options, build_model, open_graph, runner, take_turns, write_graphs
from ssmc.compressor.methods.quantize.grid import spanning_grid
from ssmc.compressor.options.quantization import group_for
from ssmc.exporters.onnx import Settings, build
from ssmc.exporters.onnx.files import DATA, GRAPH, write_graph
from ssmc.runtime.quantized import GridShape, Quantized

GROUP = 128
QUANTISED = ("in_proj.weight", "x_proj.weight", "out_proj.weight", "embeddings.weight")
WITH_CODES = {"w4": (4, False), "w4 + int8": (4, True), "w8": (8, False), "w8 + int8": (8, True)}


def codes_of(tensors: dict[str, torch.Tensor], bits: int) -> dict[str, Quantized]:
    """The large matrices rounded to nearest: how codes were chosen costs no time when they run."""
    found = {}
    for name, weight in tensors.items():
        if name.endswith(QUANTISED) and (group := group_for(weight.shape[1], GROUP)) is not None:
            found[name] = spanning_grid(weight, GridShape(bits, group)).quantized(weight)
    return found


def write_with_codes(model: PreTrainedModel, folder: Path) -> dict[str, Path]:
    """Graphs with codes; those that an earlier run left are taken as they are."""
    tensors = {name: t.detach() for name, t in model.state_dict().items() if name != "lm_head.weight"}
    for name, (bits, rounds) in WITH_CODES.items():
        if not (folder / name / GRAPH).is_file():
            (folder / name).mkdir(parents=True)
            built = build(model.config, tensors, Settings(rounds_inputs=rounds), codes_of(tensors, bits))
            write_graph(folder / name, built.model)
    return {name: folder / name for name in WITH_CODES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("mamba", "mamba2"), default="mamba")
    add_options(parser)
    args = parser.parse_args()
    logging.set_verbosity_error()
    if args.cpu_time:
        torch.set_num_threads(1)
    now = print_conditions()
    print(f"onnxruntime {onnxruntime.__version__}\n")
    ids = torch.randint(0, 50280, (1, args.length), generator=torch.Generator().manual_seed(0)).numpy()
    results: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        folder, model = args.graphs or Path(temporary), build_model(args)
        paths = write_graphs(model, folder, ["portable"]) | write_with_codes(model, folder)
        del model
        if args.only_graphs:
            return
        sizes = {name: (path / DATA).stat().st_size for name, path in paths.items()}
        sessions = {name: open_graph(path) for name, path in paths.items()}
        for title, tokens, repeats, steps in (
            (f"Prefill of {args.length} tokens", ids, args.repeats, None),
            ("Decode, per token", ids[:, :1], 4 * args.repeats, STEPS),
        ):
            calls: dict[str, Callable[[], object]] = {n: runner(session, tokens) for n, session in sessions.items()}
            timings = take_turns(args, calls, repeats, steps=steps)
            for baseline in ("onnx", "int8"):
                print_timings(title, timings, baseline)
            results[title.split()[0].strip(",").lower()] = as_json(timings, "int8")
    for name, nbytes in sizes.items():
        print(f"weights of {name}: {nbytes / 1e6:.0f} MB, 1/{sizes['onnx'] / nbytes:.1f} of float32")
    settings = {k: v for k, v in vars(args).items() if k not in ("json", "graphs")}
    settings |= {"group": GROUP, "onnxruntime": onnxruntime.__version__}
    write_json(args.json, now, settings, results | {"weight_bytes": sizes})


if __name__ == "__main__":
    main()
