"""How much faster and leaner calibration is than the plain loop of the paper's published code.

    python -m benchmarks.speed.compress_speed  # one layer of 130M shapes, L = 2048, interleaved; memory apart
    python -m benchmarks.speed.compress_speed --full  # and `ssmc compress` on a whole 24-layer checkpoint, both formats
    python -m benchmarks.speed.compress_speed --patterns  # instead: channels, and both, beside states alone

The loop is written from the formula over time steps as the published code goes about it: run the layer token by token
keeping every hidden state, add up the statistics, run the layer once more for the next layer's input. Ours collects
more (the repair's normal matrix as well) and propagates too. Both are given per sample and layer.
Memory is the peak above what the model and the layer inputs hold, each measured in a process of its own.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from transformers import MambaConfig, MambaForCausalLM

from benchmarks.pruning import pruned
from benchmarks.reporting import print_conditions
from ssmc.compressor import compress, configure, make_plan
from ssmc.compressor.calibration.placement import propagate
from ssmc.compressor.methods.method import Job
from ssmc.compressor.methods.states.collect import collect
from ssmc.compressor.methods.states.elimination import eliminate, evaluate
from ssmc.compressor.methods.states.statistics import NormalMatrix
from ssmc.runtime.models.checkpoints import write_checkpoint
from ssmc.runtime.models.families import architecture_for
from ssmc.runtime.models.fast import use_fast_scan

ARCHITECTURE = architecture_for("mamba")


SHAPES_130M = MambaConfig(hidden_size=768, state_size=16)
PLAN = make_plan(configure(model="130M shapes"), ARCHITECTURE, ARCHITECTURE.dimensions(SHAPES_130M))


def shapes_130m(layers: int, vocab: int = 50280) -> MambaForCausalLM:
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=vocab, hidden_size=768, state_size=16, num_hidden_layers=layers)
    return MambaForCausalLM(config).eval()


@torch.no_grad()
def plain_loop(block: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Statistics (L, D, N) of one layer over all samples, a time step at a time; replaces `hidden` by the outputs.

    The order of work of the published code: a forward per sample that keeps every state, running means of h^2 and sums
    of dA over (L, D, N), the score, and a second forward per sample.
    """
    _, length, _ = hidden.shape
    mixer = block.mixer
    squares = torch.zeros(length, *mixer.A_log.shape)
    decays = torch.zeros_like(squares)
    for i in range(len(hidden)):
        _, states, decay = token_by_token(block, hidden[i : i + 1])
        stacked = torch.stack(states[:length], dim=1)  # (1, L, D, N)
        squares *= i / (i + 1)
        squares += (stacked**2).sum(dim=0)
        decays += decay[0]
    weights = 1 / torch.arange(1, length + 1)
    importance = (weights[:, None, None] * decays**2 * squares).sum(dim=0)  # (D, N)
    for i in range(len(hidden)):
        hidden[i : i + 1] = token_by_token(block, hidden[i : i + 1])[0]
    return importance


def token_by_token(block: torch.nn.Module, hidden: torch.Tensor) -> tuple:
    mixer, length = block.mixer, hidden.shape[1]
    x, z = mixer.in_proj(block.norm(hidden)).chunk(2, dim=-1)
    u = F.silu(mixer.conv1d(x.transpose(1, 2))[..., :length].transpose(1, 2))  # (1, L, D)
    n, r = mixer.ssm_state_size, mixer.time_step_rank
    dt, B, C = mixer.x_proj(u).split([r, n, n], dim=-1)
    dt = F.softplus(mixer.dt_proj(dt))
    decay = torch.exp(torch.einsum("bld,dn->bldn", dt, -torch.exp(mixer.A_log)))
    drive = torch.einsum("bld,bln,bld->bldn", dt, B, u)
    h, outputs = torch.zeros_like(decay[:, 0]), []
    states = [h]
    for t in range(length):
        h = decay[:, t] * h + drive[:, t]
        outputs.append(torch.einsum("bdn,bn->bd", h, C[:, t]))
        states.append(h)
    y = torch.stack(outputs, dim=1) + mixer.D * u
    return hidden + mixer.out_proj(y * F.silu(z)), states, decay


def ours(block: torch.nn.Module, hidden: torch.Tensor) -> None:
    normal = NormalMatrix()
    collect(Job(PLAN, block, 0, hidden), [normal])
    G = normal.dense()
    evaluate(G, eliminate(G, 8, repair=True), repair=True)
    propagate(block, hidden)


def products(block: torch.nn.Module, hidden: torch.Tensor) -> None:
    """Only the matrix products that two passes over a layer cannot do without: a floor for any such method."""
    mixer = block.mixer
    for sample in hidden:
        for _ in range(2):
            x, _ = mixer.in_proj(sample).chunk(2, dim=-1)
            mixer.x_proj(x)
        mixer.out_proj(x)


WAYS = {"loop": plain_loop, "ours": ours, "products": products}
LOOPED = 2  # samples the loop is timed on; it takes every sample for itself, so more say nothing new


def timed(way: str, block: torch.nn.Module, hidden: torch.Tensor) -> float:
    hidden = hidden[:LOOPED].clone() if way == "loop" else hidden.clone()
    start = time.perf_counter()
    with torch.no_grad():
        WAYS[way](block, hidden)
    return (time.perf_counter() - start) / len(hidden)


def child(way: str, samples: int, length: int) -> None:
    """Print the peak resident memory above model and layer inputs, in bytes."""
    model = use_fast_scan(shapes_130m(layers=1, vocab=1024))
    block = model.backbone.layers[0]
    WAYS[way](block, torch.randn(1, 8, 768))  # code, thread pools and caches are not what is compared
    hidden = torch.randn(samples, length, 768)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far (Linux)
    before = psutil.Process().memory_info().rss
    with torch.no_grad():
        WAYS[way](block, hidden)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(int(peak.split()[1]) * 1024 - before)


def peak_memory(way: str, args: argparse.Namespace) -> int:
    command = [
        sys.executable,
        "-m",
        "benchmarks.speed.compress_speed",
        "--child",
        way,
        "--samples",
        str(LOOPED),
        "--length",
        str(args.length),
    ]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def whole_checkpoint(folder: Path, length: int, samples: int) -> dict[str, float]:
    """Seconds per sample and layer of `ssmc.compress` on 24 layers of 130M shapes, reading and writing included."""
    from transformers import PreTrainedTokenizerFast

    from ssmc.runtime.tiny import TINY_DIRECTORY

    model, seconds = shapes_130m(layers=24), {}
    tensors = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    for format in ("transformers", "mamba-ssm"):
        source = folder / format
        source.mkdir()
        write_checkpoint(source, tensors, model.config, format=format)
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(Path(TINY_DIRECTORY) / "tokenizer.json"))
        tokenizer.save_pretrained(source)
        start = time.perf_counter()
        compress(source, out=folder / f"{format}-out", nsamples=samples, seqlen=length)
        seconds[format] = (time.perf_counter() - start) / samples / 24
    return seconds


STATES, CHANNELS = {"pattern": "column", "sparsity": 0.75}, {"pattern": "channel", "sparsity": 0.5}
BOTH = {"pattern": "column+channel", "sparsity": {"column": 0.75, "channel": 0.5}}
PATTERNS = {"column 75 %": STATES, "channel 50 %": CHANNELS, "column 75 % + channel 50 %": BOTH}


def pattern_seconds(options: dict, model: MambaForCausalLM, tokens: torch.Tensor) -> float:
    """Seconds per sample and layer of the pipeline with one pattern, repair included."""
    model, config = copy.deepcopy(model), configure(model="130M shapes", **options)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    start = time.perf_counter()
    pruned(model, ARCHITECTURE, tokens, config, dtypes)
    return (time.perf_counter() - start) / len(tokens) / len(model.backbone.layers)


def compare_patterns(args: argparse.Namespace) -> dict:
    model = use_fast_scan(shapes_130m(args.layers, vocab=1024))
    tokens = torch.randint(1024, (args.samples, args.length), generator=torch.Generator().manual_seed(0))
    times: dict[str, list[float]] = {name: [] for name in PATTERNS}
    for options in PATTERNS.values():
        pattern_seconds(options, model, tokens[:1, :64])  # warm-up
    for _ in range(args.repeats):
        for name, options in PATTERNS.items():
            times[name].append(pattern_seconds(options, model, tokens))
    first = times["column 75 %"]
    ratios = {name: [a / b for a, b in zip(values, first, strict=True)] for name, values in times.items()}
    return {
        "shapes": {"d_model": 768, "d_inner": 1536, "d_state": 16, "L": args.length, "layers": args.layers},
        "samples": args.samples,
        "seconds_per_sample_and_layer": times,
        "times_column_alone": {
            name: {"median": statistics.median(r), "lowest": min(r), "highest": max(r)} for name, r in ratios.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--full", action="store_true", help="also compress a whole checkpoint in both formats")
    parser.add_argument("--patterns", action="store_true", help="compare the patterns that make models smaller")
    parser.add_argument("--layers", type=int, default=3, help="of the model in --patterns")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child, args.samples, args.length)
    now = print_conditions()
    if args.patterns:
        report = {"conditions": asdict(now), **compare_patterns(args)}
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n")
        return print(json.dumps(report, indent=1))
    model = use_fast_scan(shapes_130m(layers=1, vocab=1024))
    block = model.backbone.layers[0]
    hidden = torch.randn(args.samples, args.length, 768)
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for way in WAYS:
        timed(way, block, hidden[:1, :64])  # warm-up: compilers, thread pools
    for _ in range(args.repeats):
        for way in WAYS:  # interleaved, so that a noisy neighbour disturbs all
            times[way].append(timed(way, block, hidden))
    ratios = [slow / fast for slow, fast in zip(times["loop"], times["ours"], strict=True)]
    memory = {way: peak_memory(way, args) for way in ("loop", "ours")}
    report = {
        "conditions": asdict(now),
        "shapes": {"d_model": 768, "d_inner": 1536, "d_state": 16, "L": args.length, "samples": args.samples},
        "seconds_per_sample_and_layer": times,
        "ratio": {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)},
        "peak_bytes_above_model_and_inputs": memory,
        "memory_ratio": memory["ours"] / memory["loop"],
    }
    if args.full:
        with tempfile.TemporaryDirectory() as folder:
            report["whole_checkpoint"] = whole_checkpoint(Path(folder), args.length, args.samples)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
