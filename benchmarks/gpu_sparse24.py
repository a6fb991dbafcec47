"""2:4 on sparse tensor cores: modules of Mamba-2.8B shapes, each backend against dense, and a model of them.

Every call has other weights than the one before, so that no cache holds them, and the calls are replayed from a CUDA
graph where that can be recorded, so that launching them is not what is timed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from benchmarks.gpu_common import Row, Sizes, compared, make_24, mamba, timed
from ssmc.runtime.measure import workloads as work
from ssmc.runtime.measure.timing import interleave
from ssmc.runtime.models.families import architecture_for
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.sparse24 import Sparse24Linear, use_sparse24
from ssmc.runtime.sparse24.cuda import to_sparse
from ssmc.runtime.sparse24.use import fault

MAMBA = architecture_for("mamba")
COPIES = 4  # of a matrix, used in turns; at 2.8B shapes 4 hold more than the largest cache
DTYPE = torch.float16


def sparse_modules(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Every backend against dense, per module and number of tokens."""
    d, inner = sizes.d_model, 2 * sizes.d_model
    for name, (out, features) in {"in_proj": (2 * inner, d), "out_proj": (d, inner)}.items():
        linears = [make_24(nn.Linear(features, out, bias=False, dtype=DTYPE, device=device)) for _ in range(COPIES)]
        ways, refused = ways_of(linears)
        for tokens in (sizes.tokens, *sizes.steps):
            x = torch.randn(1, tokens, features, device=device).to(DTYPE)
            calls = {way: [partial(module, x) for module in modules] for way, modules in ways.items()}
            timings, note = timed(calls, device, sizes, refused)
            what = f"{name} {out} x {features}, {tokens} tokens"
            for way in (way for way in timings if way != "dense"):
                yield compared(f"{what}, {way}", timings["dense"], timings[way], note)
        yield from (Row(f"{name}, {backend}", note=f"refused: {why}") for backend, why in refused.items())


def ways_of(linears: list[nn.Linear]) -> tuple[dict[str, list[nn.Module]], dict[str, str]]:
    """Way -> the modules to use in turns; and why a backend is none: it does not run, or computes something else."""
    made = [to_sparse(linear.weight.detach()) for linear in linears]
    ways: dict[str, list[nn.Module]] = {"dense": list(linears)}
    refused = dict(made[0][1])
    x = torch.randn(1, 64, linears[0].in_features, device=linears[0].weight.device).to(linears[0].weight)
    for backend in made[0][0]:
        modules = [Sparse24Linear(weights[backend], None) for weights, _ in made]
        with torch.inference_mode():
            wrong = fault(modules[0], x, linears[0](x))
        if wrong is None:
            ways[backend] = modules
        else:
            refused[backend] = wrong
    return ways, refused


def sparse_model(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """The same model with all modules dense, and with those sparse that `use_sparse24` finds faster."""
    dense = use_fast_scan(mamba(sizes.d_model, sizes.layers, sizes.vocab)).to(device, DTYPE)
    for block in MAMBA.blocks(dense):
        for name in ("in_proj", "out_proj"):
            make_24(getattr(block.mixer, name))
    sparse = copy.deepcopy(dense)
    report = use_sparse24(sparse, 1, sizes.tokens)
    if report.reason:
        yield Row("not measured", note=report.reason)
        return
    note = f"{report.kept} of {len(report.modules)} modules run sparse"
    for what, workload in {
        f"prefill, {sizes.tokens} tokens": lambda model: work.prefill(model, 1, sizes.tokens),
        "decode, batch 1": lambda model: work.decode(model, 1),
    }.items():
        runs = {"dense": workload(dense), "sparse": workload(sparse)}
        timings = interleave(runs, device, sizes.repeats, sizes.budget / 20)
        row = compared(f"{what}, {sizes.layers} layers", timings["dense"], timings["sparse"])
        yield replace(row, note=note)
