"""Weights in few bits, alone and after pruning: what each way loses on held-out text, and what is left of the file.

    python -m benchmarks.loss.quantize  # tiny and tiny-mamba2
    python -m benchmarks.loss.quantize --model MODEL --calib train.jsonl --text valid.jsonl

"Excess" is the mean negative log-likelihood above the dense model's, in nats a token, over non-overlapping windows.
Bytes are those of packed codes, scales and zero points, and of everything else in its stored type, after cutting; the
share is of the dense model in float32. "Only in_proj" and the like quantise modules of one kind: their excess is set
beside the bytes that they save. A model that is measured again takes its old place in the file; the others stay.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.reporting import print_conditions
from ssmc.compressor import configure, make_plan, prune
from ssmc.compressor.calibration.draw import draw_samples
from ssmc.compressor.methods.method import Outcome
from ssmc.compressor.methods.quantize.summary import packed
from ssmc.compressor.pipeline import Run
from ssmc.exporters.cutting import shrink
from ssmc.runtime.manifest import LayerRecord, MaskedManifest, Origin
from ssmc.runtime.measure.conditions import Conditions
from ssmc.runtime.measure.perplexity import excess_loss, perplexity
from ssmc.runtime.models.checkpoints import Checkpoint, load_checkpoint
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.models.tokenizers import load_tokenizer
from ssmc.runtime.text import read_texts, tokenize
from ssmc.runtime.tiny import calibration_path, heldout_path

SMALLER = {
    "mamba": {"pattern": "column+channel", "sparsity": {"column": 0.75, "channel": 0.375}},
    "mamba2": {"pattern": "column+channel", "sparsity": {"column": 0.75, "channel": 0.5}},
}
"""What removes about a quarter of all parameters; of a Mamba-2 half of the heads, which is what loaders take."""
SMALL = {"quantize": "w4", "quantize_embedding": "w4"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="several are measured one after the other")
    parser.add_argument("--only", action="append", help="a row; several are measured one after the other")
    parser.add_argument("--calib", default=calibration_path(), help="calibration text")
    parser.add_argument("--text", default=heldout_path(), help="held-out text")
    parser.add_argument("--tokenizer")
    parser.add_argument("--nsamples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=64 * 1024, help="of held-out text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quantize.json"))
    return parser.parse_args()


def cases(family: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Row, options of a run."""
    for bits in ("w8", "w4"):
        for method in ("rtn", "awq", "gptq"):
            yield f"{bits} {method}", {"quantize": bits, "quantize_method": method}
    for seed in (1, 2):
        yield f"w4 gptq, other text ({seed})", {"quantize": "w4", "seed": seed}
    for method in ("rtn", "awq", "gptq"):
        yield f"w4 {method}, zero points", {"quantize": "w4", "quantize_method": method, "symmetric": False}
    for module in ("in_proj", "x_proj", "dt_proj", "out_proj") if family == "mamba" else ("in_proj", "out_proj"):
        for bits in ("w8", "w4"):
            yield f"{bits} gptq, only {module}", {"quantize": bits, "quantize_modules": module}
    yield "w4 gptq, embedding w8", {"quantize": "w4", "quantize_embedding": "w8"}
    yield "w4 gptq, embedding w4", SMALL
    if smaller := SMALLER.get(family):
        yield "pruned", smaller
        yield "pruned, w4 gptq, embedding w4", {**smaller, **SMALL}


def compressed(
    checkpoint: Checkpoint, tokens: torch.Tensor, options: dict[str, Any]
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A compressed copy of the model, and what is left of its file."""
    config = configure(model="benchmark", **options)
    other = copy.copy(checkpoint)
    other.model = copy.deepcopy(checkpoint.model)
    plan = make_plan(config, checkpoint.architecture, checkpoint.dimensions)
    done = prune(Run(other.model, plan, tokens if plan.needs_text else None, checkpoint.dtypes))
    outcome = Outcome(plan, done.layers, done.removals, outside=done.outside)
    layers = tuple(LayerRecord(layer.states_kept, layer.channels_kept) for layer in done.layers)
    left = shrink(other, MaskedManifest(Origin(), layers=layers)).tensors
    codes = packed(outcome)
    errors = [m.error for layer in done.layers if layer.quantized for m in layer.quantized.modules if m.error]
    return other.model, {
        "codes_bytes": sum(code.packed_bits for code in codes.values()) // 8,
        "other_bytes": sum(t.numel() * t.element_size() for name, t in left.items() if name not in codes),
        "parameters": sum(tensor.numel() for tensor in left.values()),
        "largest_module_error": max(errors, default=None),
    }


def measure(model: str, args: argparse.Namespace, now: Conditions) -> None:
    """Measure a model; what is found is on disk after every row."""
    checkpoint = load_checkpoint(model, dtype=torch.float32)
    tokenizer = load_tokenizer(checkpoint, args.tokenizer)
    text = tokenize(read_texts(args.text), tokenizer)[: args.max_tokens]
    dense = perplexity(use_fast_scan(checkpoint.model), text, args.window)
    whole, drawn = 4 * checkpoint.parameters, {}
    report: dict[str, Any] = {
        "model": Path(model).name,
        "conditions": asdict(now),
        "dense_perplexity": dense.ppl,
        "dense_float32_bytes": whole,
        "calibration": {"nsamples": args.nsamples, "seqlen": args.seqlen, "seed": args.seed},
        "heldout_tokens": dense.tokens,
        "rows": [],
    }
    wanted = [case for case in cases(checkpoint.architecture.model_type) if not args.only or case[0] in args.only]
    for name, options in track(wanted, model):
        seed = options.get("seed", args.seed)
        if seed not in drawn:
            drawn[seed] = draw_samples(args.calib, tokenizer, args.nsamples, args.seqlen, seed).tokens
        smaller, size = compressed(checkpoint, drawn[seed], {"seed": seed, **options})
        result = perplexity(use_fast_scan(smaller), text, args.window)
        excess = excess_loss(result, dense)
        written = size["codes_bytes"] + size["other_bytes"]
        found = {"perplexity": result.ppl, "excess_nats": excess.nats, "excess_stderr": excess.stderr}
        report["rows"].append({"name": name, **found, **size, "share_of_float32": written / whole, "options": options})
        write(report, args.out)
    print_table(report)


def main() -> None:
    args = arguments()
    now = print_conditions()
    for model in args.model or ("tiny", "tiny-mamba2"):
        measure(model, args, now)


def write(report: dict[str, Any], out: Path) -> None:
    """Put what was found of one model into the file, in the place of what it said of that model before."""
    before = json.loads(out.read_text())["models"] if out.is_file() else []
    models = [model for model in before if model["model"] != report["model"]]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"models": [*models, report]}, indent=1) + "\n")


def print_table(report: dict[str, Any]) -> None:
    title = f"{report['model']}: perplexity {report['dense_perplexity']:.3f}, {report['dense_float32_bytes']} bytes"
    table = Table("", "perplexity", "excess nats", "bytes", "of float32", title=title)
    for row in report["rows"]:
        written = row["codes_bytes"] + row["other_bytes"]
        excess = f"{row['excess_nats']:+.4f} ± {row['excess_stderr'] or 0:.4f}"
        share = f"1/{1 / row['share_of_float32']:.1f}"
        table.add_row(row["name"], f"{row['perplexity']:.3f}", excess, f"{written / 1e6:.2f} MB", share)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
