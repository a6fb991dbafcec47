"""ONNX on a CPU beside torch: speed at Mamba-130M shapes, and size, speed and perplexity of a trained model.

    python -m benchmarks.speed.onnx_speed --json benchmarks/results/onnx_speed.json
    python -m benchmarks.speed.onnx_speed --family mamba2 --json benchmarks/results/onnx_speed_mamba2.json
    python -m benchmarks.speed.onnx_speed --model MODEL --json benchmarks/results/onnx_quality.json  # text: --text

Without --model: random weights, which cost the same time as trained ones. "stock" is transformers' loop over tokens,
"torch" the same model with our scan, "onnx" and "int8" graphs of it in onnxruntime, for Mamba-2 also with --target ort,
"products" a graph of the float32 matrix products of one token and nothing else; all take turns, with as many threads as
torch has. With --cpu-time each has one thread, and its processor time counts: other work on the machine
disturbs that less than time on the clock. With --model: a trained model, dense and pruned (--pattern, --sparsity), each
in float32 and int8.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from onnxscript import GraphBuilder
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel
from transformers.utils import logging

from benchmarks.reporting import as_json, print_conditions, print_timings, write_json
from ssmc.compressor import compress
from ssmc.exporters import export
from ssmc.exporters.onnx import Settings, build
from ssmc.exporters.onnx.files import GRAPH, write_graph
from ssmc.exporters.onnx.graph import require_family
from ssmc.exporters.onnx.layers import LAYERS
from ssmc.exporters.onnx.quality import measure
from ssmc.exporters.onnx.quantize import quantize_int8
from ssmc.exporters.onnx.running import fresh_states
from ssmc.runtime.measure.timing import Timing, interleave, paired_ratio
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.fast import use_fast_scan, use_stock_scan
from ssmc.runtime.models.tokenizers import load_tokenizer
from ssmc.runtime.progress import NO_PROGRESS
from ssmc.runtime.text import read_texts, tokenize
from ssmc.runtime.tiny import heldout_path

CPU = torch.device("cpu")


def build_model(args: argparse.Namespace) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50280, "hidden_size": args.d_model, "num_hidden_layers": args.layers}
    if args.family == "mamba":
        return MambaForCausalLM(MambaConfig(**sizes, state_size=args.d_state or 16)).eval()
    heads = {"head_dim": 64, "num_heads": 2 * args.d_model // 64, "n_groups": 1, "tie_word_embeddings": True}
    return Mamba2ForCausalLM(Mamba2Config(**sizes, **heads, state_size=args.d_state or 128)).eval()


def write_graphs(model: PreTrainedModel, folder: Path, targets: Sequence[str] = ()) -> dict[str, Path]:
    """Graphs of a model in float32 and int8, for every target unless some are named; those an earlier run left there
    are taken as they are."""
    tensors = {name: t for name, t in model.state_dict().items() if name != "lm_head.weight"}
    found = {}
    for target in targets or LAYERS.find(model.config.model_type).TARGETS:
        first, second = ("onnx", "int8") if target == "portable" else (target, f"{target} int8")
        found |= {name: folder / name for name in (first, second)}
        if (folder / second / GRAPH).is_file():
            continue
        family = require_family(model.config, target)
        folders = [folder / name for name in (first, second, f"{target} float", f"{target} quantised")]
        for each in folders:
            each.mkdir(parents=True)
        plain, int8, own_head, quantised = folders
        write_graph(plain, build(model.config, tensors, Settings(target=target)).model)
        write_graph(own_head, build(model.config, tensors, Settings(own_head=True, target=target)).model)
        write_graph(int8, quantize_int8(own_head, quantised, (family.embedding, family.head)))
        shutil.rmtree(own_head)
        shutil.rmtree(quantised)
    return found


def write_products(model: PreTrainedModel, folder: Path) -> Path:
    """A graph of nothing but one token's products with all matrices of a model: what no decoding can be faster than."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 23}, name="products")
    builder = GraphBuilder(graph)
    matrices = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    read = {
        width: builder.input(f"x_{width}", ir.DataType.FLOAT, [1, width]) for width in {w.shape[1] for w in matrices}
    }
    for number, weight in enumerate(matrices):
        matrix = ir.tensor(weight.detach().t().contiguous().numpy(), name=f"w_{number}")
        y = builder.op.MatMul(read[weight.shape[1]], builder.initializer(matrix))
        builder.add_output(y, f"y_{number}")
    folder.mkdir(parents=True, exist_ok=True)
    write_graph(folder, ir.Model(graph, ir_version=11))
    return folder


def open_graph(folder: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # else its threads spin while the other contenders' turn is on
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(folder / GRAPH, options, providers=["CPUExecutionProvider"])


STEPS = 8  # of decoding in a sample


def take_turns(
    args: argparse.Namespace, calls: dict[str, Callable[[], object]], repeats: int, steps: int | None = None
) -> dict[str, Timing]:
    """Interleaved timings, on the clock or in processor time.

    Args:
        args: of the command line.
        calls: by contender.
        repeats: rounds.
        steps: of decoding that a sample is the mean of, with one more before it: a text is written by one model, not by
            all in turns. None: a sample is one call, or as many as it takes to be timed.
    """
    if not args.cpu_time:
        warm = calls if steps else None
        return interleave(calls, CPU, repeats, budget=args.budget, calls=steps, prepare=warm)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(repeats + 1):
        for name, call in calls.items():
            if steps:
                call()
            begin = time.process_time()
            for _ in range(steps or 1):
                call()
            if number:  # the first warms up
                samples[name].append((time.process_time() - begin) / (steps or 1))
    return {name: Timing(tuple(seconds)) for name, seconds in samples.items()}


def runner(session: onnxruntime.InferenceSession, ids: np.ndarray) -> Callable[[], object]:
    """One call of a graph; the states are any, since time does not depend on them."""
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), **fresh_states(session, len(ids))}
    return lambda: session.run(None, feed)


def speed(args: argparse.Namespace) -> dict[str, dict]:
    """Prefill and decode of all contenders."""
    model = build_model(args)
    ids = torch.randint(0, 50280, (1, args.length), generator=torch.Generator().manual_seed(0))
    results = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        paths = write_graphs(model, args.graphs or Path(folder))
        if args.only_graphs:
            return {}
        sizes = {name: (path / "model.onnx.data").stat().st_size for name, path in paths.items()}
        sessions = {name: open_graph(path) for name, path in paths.items()}
        products = open_graph(write_products(model, Path(folder) / "products"))
        vectors = {value.name: np.ones(value.shape, np.float32) for value in products.get_inputs()}
        cache = use_fast_scan(model)(ids, use_cache=True).cache_params
        switch = {"stock": use_stock_scan, "torch": use_fast_scan}
        for title, tokens, cached, repeats in (
            (f"Prefill of {args.length} tokens", ids, None, args.repeats),
            ("Decode, per token", ids[:, :1], cache, 4 * args.repeats),
        ):
            calls: dict[str, Callable[[], object]] = {
                name: lambda use=use, tokens=tokens, cached=cached: use(model)(
                    tokens, cache_params=cached, use_cache=True, logits_to_keep=1
                )
                for name, use in switch.items()
            }
            calls |= {name: runner(session, tokens.numpy()) for name, session in sessions.items()}
            if cached is not None:
                calls["products"] = lambda: products.run(None, vectors)
            timings = take_turns(args, calls, repeats, steps=None if cached is None else STEPS)
            print_timings(title, timings, "stock")
            ratio = paired_ratio(timings["onnx"], timings["int8"])
            print(f"int8 is {ratio.median:.2f} times as fast as float32 ONNX ({ratio.low:.2f} .. {ratio.high:.2f})\n")
            results[title.split()[0].lower()] = as_json(timings, "stock")
    for name, nbytes in sizes.items():
        print(f"weights of {name}: {nbytes / 1e6:.0f} MB")
    return results | {"weight_bytes": sizes}


def trained(args: argparse.Namespace) -> dict[str, dict]:
    """A trained model: dense float32, then pruned, then int8 as well."""
    dense = load_checkpoint(args.model, dtype=torch.float32)
    source = heldout_path() if args.text is None else args.text
    stream = tokenize(read_texts(source), load_tokenizer(dense))
    rows, sessions = {}, {}
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder = Path(name)
        parts = dict(zip(args.pattern.split("+"), map(float, args.sparsity.split("+")), strict=True))
        compress(
            args.model,
            out=folder / "pruned",
            pattern=args.pattern,
            sparsity=parts,
            nsamples=args.nsamples,
            seqlen=args.seqlen,
        )
        plan = {"dense": (args.model, {}), "dense int8": (args.model, {"quantize": "int8"})}
        plan |= {"pruned": (folder / "pruned", {}), "pruned int8": (folder / "pruned", {"quantize": "int8"})}
        for number, (title, (origin, options)) in enumerate(plan.items()):
            out = folder / str(number)
            result = export(
                origin, format="onnx", out=out, text=str(source) if options else None, target=args.target, **options
            )
            model = dense if "dense" in title else load_checkpoint(folder / "pruned", dtype=torch.float32)
            found = measure(model.model, out, stream, str(source), NO_PROGRESS)
            rows[title] = {
                "bytes": result.weight_bytes[1],
                "ppl": found.ppl_after,
                "ppl_torch_float32": found.ppl_before,
                "tokens": found.tokens,
            }
            sessions[title] = open_graph(out)
        ids = stream[None, : args.length].numpy()
        timings = {
            "prefill": take_turns(args, {k: runner(s, ids) for k, s in sessions.items()}, args.repeats),
            "decode": take_turns(
                args, {k: runner(s, ids[:, :1]) for k, s in sessions.items()}, 4 * args.repeats, steps=STEPS
            ),
        }
    for kind, timing in timings.items():
        print_timings(kind, timing, "dense")
        for title, row in rows.items():
            row[kind] = as_json(timing, "dense")[title]
    for title, row in rows.items():
        ppl = f"perplexity {row['ppl']:.4f} (torch, float32: {row['ppl_torch_float32']:.4f})"
        print(f"{title:<12} {row['bytes'] / 1e6:6.2f} MB   {ppl}")
    return rows


def add_options(parser: argparse.ArgumentParser) -> None:
    """What every benchmark of graphs asks: shapes, rounds, and where graphs and figures go."""
    parser.add_argument("--length", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--d-state", type=int, help="16 for mamba, 128 for mamba2 unless given")
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--budget", type=float, default=150, help="seconds for each table")
    parser.add_argument("--cpu-time", action="store_true", help="one thread each, processor time")
    parser.add_argument("--graphs", type=Path, help="where to keep the graphs, so that the next run finds them")
    parser.add_argument("--only-graphs", action="store_true", help="write them and time nothing")
    parser.add_argument("--json", type=Path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("mamba", "mamba2"), default="mamba", help="of the random weights")
    parser.add_argument("--model", help="a trained model instead of random weights")
    parser.add_argument("--text", help="held-out text for --model; the embedded stories unless given")
    parser.add_argument("--pattern", default="column+channel", help="of --model")
    parser.add_argument("--sparsity", default="0.75+0.25", help="of --model, one for each part of the pattern")
    parser.add_argument("--target", default="portable", help="of the graphs of --model")
    parser.add_argument("--nsamples", type=int, default=64, help="of the calibration of --model")
    parser.add_argument("--seqlen", type=int, default=2048, help="of the calibration of --model")
    add_options(parser)
    args = parser.parse_args()
    logging.set_verbosity_error()  # transformers recommends CUDA kernels
    if args.cpu_time:
        torch.set_num_threads(1)
    now = print_conditions()
    print("processor time of one thread" if args.cpu_time else "time on the clock")
    print(f"onnxruntime {onnxruntime.__version__}\n")
    results = trained(args) if args.model else speed(args)
    settings = {k: v for k, v in vars(args).items() if k not in ("json", "model", "text", "graphs")}
    write_json(args.json, now, settings | {"onnxruntime": onnxruntime.__version__}, results)


if __name__ == "__main__":
    main()
