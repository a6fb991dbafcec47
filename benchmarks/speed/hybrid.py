"""A hybrid of the size of Mamba-130M beside one with half of its parameters, end to end on a CPU: prefill and decode.

    python -m benchmarks.speed.hybrid --json benchmarks/results/hybrid.json

Nemotron-H's layout with Mamba-2, MLP and attention layers. The smaller one has the sizes that `ssmc compress --pattern
head+mlp+attention` and `ssmc export` leave, and both have random weights: speed does not depend on them, and the loss
of such a model means nothing. Both are run as transformers' models with our scan and as ONNX graphs in onnxruntime, in
turns. Prefill computes the last token's logits and fills the caches; decoding is a token after a prompt.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import NemotronHConfig, NemotronHForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from benchmarks.reporting import as_json, print_conditions, print_timings, write_json
from ssmc import export
from ssmc.runtime.measure import workloads
from ssmc.runtime.measure.timing import interleave
from ssmc.runtime.models.checkpoints import load_checkpoint, parameter_count
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.models.generation import load_onnx_export
from ssmc.runtime.tiny import TINY_DIRECTORY

KINDS = {"M": "mamba", "*": "attention", "-": "mlp"}
PATTERN = "M-M-M-M*-M-M-M-M*-M-M-M-"
SIZES: dict[str, Any] = {
    "vocab_size": 24576,  # with a head of its own, as many numbers as a tied one of 49152
    "hidden_size": 768,
    "layers_block_type": [KINDS[kind] for kind in PATTERN],
    "mamba_num_heads": 24,
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
    "n_groups": 1,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 3072,
}
PRUNED = {"mamba_num_heads": 7, "intermediate_size": 832, "num_attention_heads": 6, "num_key_value_heads": 2}
CPU = torch.device("cpu")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def write(sizes: dict[str, Any], folder: Path) -> Path:
    """A random model, and tiny's tokenizer so that an export has text to be proven on."""
    torch.manual_seed(0)
    NemotronHForCausalLM(NemotronHConfig(**sizes)).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_file=str(Path(TINY_DIRECTORY) / "tokenizer.json")).save_pretrained(folder)
    return folder


def main() -> None:
    args = arguments()
    logging.set_verbosity_error()
    now = print_conditions()
    with TemporaryDirectory() as name:
        folder = Path(name)
        places = {"dense": write(SIZES, folder / "dense"), "pruned": write(SIZES | PRUNED, folder / "pruned")}
        checkpoints = {name: load_checkpoint(place, dtype=torch.float32) for name, place in places.items()}
        left = {name: parameter_count(checkpoint.tensors()) for name, checkpoint in checkpoints.items()}
        print(
            f"parameters: {left['dense']:,} -> {left['pruned']:,} ({left['pruned'] / left['dense']:.3f})\n", flush=True
        )
        models = {"transformers, our scan": {n: use_fast_scan(c.model) for n, c in checkpoints.items()}}
        graphs = {n: export(place, format="onnx", out=folder / f"{n}-onnx").directory for n, place in places.items()}
        models["onnxruntime"] = {name: load_onnx_export(graph, "cpu").model for name, graph in graphs.items()}
        results = {}
        for runtime, both in models.items():
            runs = {
                f"prefill of {args.length} tokens": {n: workloads.prefill(m, 1, args.length) for n, m in both.items()},
                "decode of a token": {name: workloads.decode(model, 1) for name, model in both.items()},
            }
            for what, pair in runs.items():
                timings = interleave(pair, CPU, args.rounds, 60.0)
                print_timings(f"{runtime}: {what}", timings, "dense")
                results[f"{runtime}: {what}"] = as_json(timings, "dense")
        settings = {**SIZES, "pruned": PRUNED, "length": args.length}
        write_json(args.json, now, settings | {"parameters": left}, results)


if __name__ == "__main__":
    main()
