"""What column and channel pruning buy end to end: dense against pruned, both in stock transformers with our scan.

    python -m benchmarks.speed.end_to_end  # Mamba-130M shapes, column 75 % + channel 50 %, 512 tokens
    python -m benchmarks.speed.end_to_end --column 0.5 --channel 0.25 --json end_to_end.json

The weights are random: speed does not depend on their values. The pruned model goes the whole way: `compress`,
`export`, `from_pretrained`. Prefill computes the last token's logits and fills the cache; decoding is one token. The
parts are timed in place, in runs of their own with clocks between them, and add up to the whole: embedding and head
included.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM
from transformers.utils import logging

from benchmarks.reporting import as_json, print_conditions, print_timings, write_json
from ssmc import compress, export
from ssmc.runtime.bench import Workload
from ssmc.runtime.measure.timing import interleave
from ssmc.runtime.models.architectures import mamba1
from ssmc.runtime.models.fast import use_fast_scan

CPU = torch.device("cpu")
MODULES = {"embeddings": "embedding", "norm": "norms", "norm_f": "norms", "in_proj": "in_proj", "act": "silu (u)"}
MODULES |= {"x_proj": "x_proj", "out_proj": "out_proj", "lm_head": "head"}
CONV, DT, SCAN, REST = "conv1d", "dt_proj, softplus, exp(A_log)", "scan, gate", "residuals, cache, Python"
ORDER = ("embedding", "norms", "in_proj", CONV, "silu (u)", "x_proj", DT, SCAN, "out_proj", REST, "head")


class Clocks:
    """Seconds by part of one model's calls; `watching` puts the clocks in and takes them out again."""

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self.parts: dict[str, float] = {}
        self.calls: list[dict[str, float]] = []
        self._started: dict[int, float] = {}

    def run(self, workload: Callable[[], object]) -> None:
        """One call of the workload, part by part."""
        self.parts = defaultdict(float)
        with self.watching():
            start = time.perf_counter()
            workload()
            total = time.perf_counter() - start
        # what scan_inputs does besides the parts that have clocks of their own
        self.parts[DT] -= sum(self.parts[name] for name in (CONV, "silu (u)", "x_proj"))
        self.parts[REST] = total - sum(self.parts.values())
        self.calls.append(dict(self.parts))

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Clocks around modules, and around the functions between them."""
        handles = []
        for name, module in self.model.named_modules():
            if part := MODULES.get(name.rpartition(".")[2]):
                handles += [module.register_forward_pre_hook(self._begin)]
                handles += [module.register_forward_hook(lambda m, *_, part=part: self._end(m, part))]
        functions = ((mamba1, "causal_conv", CONV), (mamba1.Mamba1, "scan", SCAN))
        functions += ((mamba1.Mamba1, "scan_inputs", DT),)
        originals = [(owner, name, getattr(owner, name)) for owner, name, _ in functions]
        for owner, name, part in functions:
            setattr(owner, name, self._timed(getattr(owner, name), part))
        try:
            yield
        finally:
            for owner, name, function in originals:
                setattr(owner, name, function)
            for handle in handles:
                handle.remove()

    def _begin(self, module: torch.nn.Module, *_: object) -> None:
        self._started[id(module)] = time.perf_counter()

    def _end(self, module: torch.nn.Module, part: str) -> None:
        self.parts[part] += time.perf_counter() - self._started[id(module)]

    def _timed(self, function: Callable, part: str) -> Callable:
        def run(*args: object, **kwargs: object) -> object:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.parts[part] += time.perf_counter() - start
            return result

        return run


def models(args: argparse.Namespace, folder: Path) -> dict[str, MambaForCausalLM]:
    """The dense and the pruned model, as stock transformers reads them from files."""
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=50280, hidden_size=args.d_model, num_hidden_layers=args.layers, state_size=args.d_state
    )
    MambaForCausalLM(config).save_pretrained(folder / "dense")
    parts = {"column": args.column, "channel": args.channel}
    wanted = {part: share for part, share in parts.items() if share}
    compress(
        folder / "dense",
        out=folder / "pruned",
        pattern="+".join(wanted),
        sparsity=wanted,
        score=dict.fromkeys(wanted, "magnitude"),  # looks at no text, which random weights have none of
        repair=False,
    )
    export(folder / "pruned")
    paths = {"dense": folder / "dense", "pruned": folder / "pruned" / "safetensors"}
    return {name: AutoModelForCausalLM.from_pretrained(path).eval() for name, path in paths.items()}


def measure(loaded: dict[str, MambaForCausalLM], workload: Workload, repeats: int) -> tuple[dict, dict]:
    """The whole, and then its parts: medians over interleaved rounds."""
    runs = {name: workload.on(model) for name, model in loaded.items()}
    decode = workload.phase == "decode"
    whole = interleave(runs, CPU, repeats, budget=60, calls=workload.calls, prepare=runs if decode else None)
    clocks = {name: Clocks(model) for name, model in loaded.items()}
    watched = {name: lambda name=name: clocks[name].run(runs[name]) for name in runs}
    interleave(watched, CPU, repeats, budget=60, calls=workload.calls, prepare=watched if decode else None)
    parts = {
        name: {part: median(call.get(part, 0.0) for call in clock.calls[2:]) for part in ORDER}
        for name, clock in clocks.items()
    }
    return whole, parts


def show(title: str, parts: dict[str, dict[str, float]]) -> None:
    table = Table(title=title, title_justify="left")
    for column in ("part", "dense, ms", "share", "pruned, ms", "share", "times faster"):
        table.add_column(column, justify="left" if column == "part" else "right")
    totals = {name: sum(figures.values()) for name, figures in parts.items()}
    rows = {**{part: [parts[name][part] for name in parts] for part in ORDER}, "all": list(totals.values())}
    for part, (dense, pruned) in rows.items():
        shares = f"{dense / totals['dense']:.1%}", f"{pruned / totals['pruned']:.1%}"
        table.add_row(part, f"{1e3 * dense:.2f}", shares[0], f"{1e3 * pruned:.2f}", shares[1], f"{dense / pruned:.2f}")
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--d-state", type=int, default=16)
    parser.add_argument("--column", type=float, default=0.75, help="part of the states that goes")
    parser.add_argument("--channel", type=float, default=0.5, help="part of the channels that goes")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logging.set_verbosity_error()  # transformers recommends CUDA kernels
    now = print_conditions()
    with TemporaryDirectory() as folder:
        loaded = models(args, Path(folder))
    for name, model in loaded.items():
        use_fast_scan(model)
        c = model.config
        print(
            f"{name}: {type(model).__module__}.{type(model).__name__}, {c.num_hidden_layers} layers, d_inner "
            f"{c.intermediate_size}, d_state {c.state_size}, {sum(p.numel() for p in model.parameters()):,} parameters"
        )
    print()
    results = {}
    for workload in (Workload("prefill", args.batch, args.length), Workload("decode", args.batch)):
        whole, parts = measure(loaded, workload, args.repeats)
        print_timings(f"{workload}".capitalize(), whole, "dense")
        show("The same by part, with clocks in between", parts)
        results[workload.phase] = as_json(whole, "dense")
        results[f"{workload.phase}_parts"] = {name: {"seconds": figures} for name, figures in parts.items()}
    write_json(args.json, now, {k: v for k, v in vars(args).items() if k != "json"}, results)


if __name__ == "__main__":
    main()
