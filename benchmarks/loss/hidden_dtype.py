"""What it costs to keep hidden states of the calibration samples in half precision between layers.

    python -m benchmarks.loss.hidden_dtype --out benchmarks/results/hidden_dtype.json

"Excess" is the mean negative log-likelihood of the pruned model above the dense one's, in nats a token on held-out
text; "against float32" is that above the model pruned with float32, with its standard error over the same windows.
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

from benchmarks.pruning import pruned
from benchmarks.reporting import print_conditions
from ssmc.compressor import configure
from ssmc.compressor.calibration.draw import draw_samples
from ssmc.runtime.measure.perplexity import Perplexity, excess_loss, perplexity
from ssmc.runtime.models.checkpoints import Checkpoint, load_checkpoint
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.models.tokenizers import load_tokenizer
from ssmc.runtime.text import read_texts, tokenize
from ssmc.runtime.tiny import calibration_path, heldout_path

CASES = {"tiny": ("column", "column+channel"), "tiny-mamba2": ("column", "column+channel"), "tiny-hybrid": ("column",)}
TYPES = ("float32", "bfloat16", "float16")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--nsamples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=16 * 1024, help="of held-out text")
    parser.add_argument("--out", type=Path, help="JSON file; results of other models in it stay")
    return parser.parse_args()


def kept(layers: Any) -> list[Any]:
    """What stays in each layer."""
    return [(layer.states_kept, layer.channels_kept) for layer in layers]


def of_pattern(args: argparse.Namespace, checkpoint: Checkpoint, pattern: str) -> Iterator[dict[str, Any]]:
    """A row for each type, float32 first."""
    tokenizer = load_tokenizer(checkpoint, None)
    tokens = draw_samples(calibration_path(), tokenizer, args.nsamples, args.seqlen, 0).tokens
    text = tokenize(read_texts(heldout_path()), tokenizer)[: args.max_tokens]
    dense = perplexity(use_fast_scan(checkpoint.model), text, args.window)
    first: tuple[Perplexity, list[Any]] | None = None
    for name in TYPES:
        config = configure(model=checkpoint.source, pattern=pattern, hidden_dtype=name)
        model = copy.deepcopy(checkpoint.model)
        layers = pruned(model, checkpoint.architecture, tokens, config, checkpoint.dtypes).layers
        found = perplexity(model, text, args.window)
        first = first or (found, kept(layers))
        same = sum(one == other for one, other in zip(kept(layers), first[1], strict=True))
        row = {"model": checkpoint.source, "pattern": pattern, "hidden_dtype": name}
        row |= {"excess": asdict(excess_loss(found, dense)), "against_float32": asdict(excess_loss(found, first[0]))}
        yield row | {"layers_that_keep_the_same": same, "layers": len(layers)}


def main() -> None:
    """Prune, measure, print and write."""
    args = arguments()
    now, rows = print_conditions(torch.float32), []
    for name in args.models:
        checkpoint = load_checkpoint(name, dtype=torch.float32)
        for pattern in CASES[name]:
            for row in of_pattern(args, checkpoint, pattern):
                rows.append(row)
                change = row["against_float32"]
                print(
                    f"{name:<12} {pattern:<15} {row['hidden_dtype']:<9} {row['excess']['nats']:+.5f} nats, "
                    f"{change['nats']:+.5f} ± {change['stderr'] or 0:.5f} against float32; "
                    f"{row['layers_that_keep_the_same']} of {row['layers']} layers keep the same",
                    flush=True,
                )
    if args.out is not None:
        before = json.loads(args.out.read_text())["rows"] if args.out.is_file() else []
        rows = [row for row in before if row["model"] not in args.models] + rows
        record = {"conditions": asdict(now), "nsamples": args.nsamples, "seqlen": args.seqlen, "rows": rows}
        args.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
