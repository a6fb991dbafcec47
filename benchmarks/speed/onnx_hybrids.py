"""ONNX graphs of a hybrid in onnxruntime: ours beside those that mobius-onnx makes of the same model.

    pip install mobius-onnx                                    # in an environment of its own
    python benchmarks/speed/mobius_graph.py MODEL mobius       # there
    python -m benchmarks.speed.onnx_hybrids --rival mobius --json benchmarks/results/onnx_hybrids.json

MODEL is a folder in transformers' layout, `ssmc/runtime/tiny_hybrid` for the embedded one. All graphs run through
onnxruntime's plain `run`, on one thread, in turns; its processor time counts. mobius' graph gives the logits of every
token and has operators of onnxruntime's own; so ours is measured with all logits too, and with the target `ort`. What
each computes is compared with stock transformers first.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from benchmarks.reporting import as_json, print_conditions, print_timings, write_json
from ssmc.exporters import export
from ssmc.runtime.measure.timing import Timing
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.generation.onnx_names import present_name
from ssmc.runtime.models.tokenizers import load_tokenizer
from ssmc.runtime.text import read_texts, tokenize
from ssmc.runtime.tiny import heldout_path

DECODED = 16  # tokens of one sample


class Graph:
    """A session whose states go in again as they came out."""

    def __init__(self, folder: Path):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", options, ["CPUExecutionProvider"])
        self.pasts = [value for value in self.session.get_inputs() if value.name.startswith("past_")]
        self.presents = [present_name(past.name) for past in self.pasts]
        masks = [value for value in self.session.get_inputs() if value.name == "attention_mask"]
        self.total = "past" in str(masks[0].shape[1])  # a mask of all tokens so far, or of these
        self.reset()

    def reset(self) -> None:
        self.read = 0
        self.states = {
            past.name: np.zeros([1, *(size if isinstance(size, int) else 0 for size in past.shape[1:])], np.float32)
            for past in self.pasts
        }

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        self.read += ids.shape[1]
        mask = np.ones((1, self.read if self.total else ids.shape[1]), np.int64)
        feeds = {"input_ids": ids, "attention_mask": mask, **self.states}
        logits, *states = self.session.run(["logits", *self.presents], feeds)
        self.states = dict(zip(self.states, states, strict=True))
        return logits


def agreement(graph: Graph, ids: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference of a logit, of the whole prompt's last token and token by token."""
    graph.reset()
    worst = float(np.abs(graph(ids)[:, -1] - wanted[:, -1]).max())
    graph.reset()
    for at in range(40):
        worst = max(worst, float(np.abs(graph(ids[:, at : at + 1])[:, -1] - wanted[:, at]).max()))
    return worst


def interleaved(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, Timing]:
    """Processor seconds of each, one after the other, round by round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 2):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if number > 1:
                seconds[name].append(time.process_time() - start)
    return {name: Timing(tuple(values), 1) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-hybrid")
    parser.add_argument("--rival", type=Path, help="folder of mobius' graph")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    now = print_conditions()
    checkpoint = load_checkpoint(arguments.model, dtype=torch.float32)
    tokens = tokenize(read_texts(heldout_path()), load_tokenizer(checkpoint))[None]
    work = Path(tempfile.mkdtemp())
    kinds = {"ours": {}, "ours, all logits": {"logits": "all"}, "ours, int8": {"quantize": "int8"}}
    kinds |= {"ours, ort": {"target": "ort"}, "ours, ort, int8": {"target": "ort", "quantize": "int8"}}
    for name, options in kinds.items():
        export(arguments.model, format="onnx", out=work / name, **options)
    graphs = {name: Graph(work / name) for name in kinds}
    if arguments.rival:
        graphs["mobius"] = Graph(arguments.rival)
    longest = max(arguments.lengths)
    with torch.inference_mode():
        wanted = checkpoint.model(tokens[:, :longest], use_cache=False).logits.numpy()
    ids = tokens[:, : longest + DECODED].numpy()
    differences = {name: agreement(graph, ids[:, :longest], wanted) for name, graph in graphs.items()}
    for name, difference in differences.items():
        print(f"{name}: logits within {difference:.2e} of stock transformers (largest {np.abs(wanted).max():.3g})")
    print()
    results: dict[str, dict] = {"difference": differences}
    for length in arguments.lengths:

        def prefill(graph: Graph, length: int = length) -> None:
            graph.reset()
            graph(ids[:, :length])

        timings = interleaved({name: (lambda g=g: prefill(g)) for name, g in graphs.items()}, arguments.rounds)
        print_timings(f"prefill of {length} tokens", timings, "ours")
        results[f"prefill_{length}"] = as_json(timings, "ours")

        def decode(graph: Graph, length: int = length) -> None:
            for at in range(length, length + DECODED):
                graph(ids[:, at : at + 1])

        for graph in graphs.values():
            prefill(graph)
        timings = interleaved({name: (lambda g=g: decode(g)) for name, g in graphs.items()}, arguments.rounds)
        timings = {n: Timing(tuple(s / DECODED for s in t.seconds), DECODED) for n, t in timings.items()}
        print_timings(f"one token after {length} and more", timings, "ours")
        results[f"decode_{length}"] = as_json(timings, "ours")
    shutil.rmtree(work)
    settings = {"model": arguments.model, "rounds": arguments.rounds, "threads": 1, "decoded": DECODED}
    write_json(arguments.json, now, settings, results)


if __name__ == "__main__":
    main()
