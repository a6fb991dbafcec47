"""Run the 2:4 modules of a loaded model on sparse tensor cores, each only where that measures faster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ssmc.runtime.errors import UsageError
from ssmc.runtime.measure.timing import Ratio, Timing, interleave, paired_ratio
from ssmc.runtime.models.families import architecture_for
from ssmc.runtime.progress import NO_PROGRESS, Progress
from ssmc.runtime.sparse24.backends import obstacle
from ssmc.runtime.sparse24.cuda import first_line, to_sparse, why_dense
from ssmc.runtime.sparse24.packing import is_24

DENSE = "dense"
LARGEST_ERROR = 0.02  # relative, of a sparse product in half precision; bf16 rounding alone is below 0.01
SAMPLE = 0.003  # seconds a timed sample lasts at least; CUDA events resolve a thousandth of that
ROUNDS = 12


@dataclass(frozen=True)
class ModuleReport:
    """What was found out about one 2:4 module."""

    name: str  # "backbone.layers.0.mixer.in_proj"
    shape: tuple[int, ...]  # (out, in)
    backend: str | None  # the fastest sparse one; None where none ran
    dense: Timing | None  # seconds per call; None where nothing was measured
    sparse: Timing | None
    ratio: Ratio | None  # dense over sparse: above 1, sparse is faster
    kept: bool  # whether it runs sparse now
    reason: str  # why it runs dense, "" if it does not


@dataclass(frozen=True)
class Sparse24Report:
    """Which 2:4 modules run sparse, and why the others do not."""

    batch: int
    length: int
    modules: tuple[ModuleReport, ...]
    reason: str | None  # one sentence where this machine or dtype has no sparse tensor cores

    @property
    def kept(self) -> int:
        """Modules that run sparse."""
        return sum(module.kept for module in self.modules)

    def to_json(self) -> dict[str, Any]:
        """Everything in types JSON has; seconds are medians."""
        rows = [
            {
                "name": m.name,
                "shape": list(m.shape),
                "backend": m.backend,
                "dense_seconds": None if m.dense is None else m.dense.median,
                "sparse_seconds": None if m.sparse is None else m.sparse.median,
                "ratio": None if m.ratio is None else asdict(m.ratio),
                "kept": m.kept,
                "reason": m.reason,
            }
            for m in self.modules
        ]
        return {"batch": self.batch, "length": self.length, "reason": self.reason, "kept": self.kept, "modules": rows}


class Sparse24Linear(nn.Module):
    """A linear map whose weight is torch's 2:4 tensor; for calls of few tokens it may have the dense weight as well.

    Args:
        weight: 2:4 tensor (out, in).
        bias: (out,) or None.
        dense: the same weight, dense; None: calls of any size run sparse.
        few: calls with fewer tokens run dense.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, dense: torch.Tensor | None = None, few: int = 0
    ):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = bias
        self.dense = dense
        self.few = few

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        if self.dense is not None and x.numel() < self.few * x.shape[-1]:
            return F.linear(x, self.dense, self.bias)
        return F.linear(x.contiguous(), self.weight, self.bias)  # sparse products view their input as a matrix


def use_sparse24(
    model: nn.Module,
    batch: int = 1,
    length: int = 2048,
    *,
    keep_dense: bool | None = None,
    rounds: int = ROUNDS,
    progress: Progress = NO_PROGRESS,
) -> Sparse24Report:
    """Measure every 2:4 module of a model dense against sparse and run it sparse where that is faster.

    Args:
        model: a transformers model on the device it will run on, in float16 or bfloat16; changed in place. It can run,
            but not be saved, afterwards: safetensors has no place for such tensors.
        batch: sequences at once, as it will be used.
        length: tokens of each: of the prompts, or 1 for decoding.
        keep_dense: also keep the dense weights and use them for calls of less than half as many tokens, where sparse
            products are slow: decoding after a prefill. None: if `length` is more than 1.
        rounds: rounds of every timing at most.
        progress: told about modules.

    Returns:
        One row a module. Where there are no sparse tensor cores the model stays as it is and the report says why.

    Raises:
        CheckpointError: this is no model ssmc knows.
        UsageError: batch or length is no positive number.
    """
    if batch < 1 or length < 1:
        raise UsageError(f"batch and length must be at least 1, not {batch} and {length}.")
    found = list(modules_24(model))
    parameter = next(model.parameters())
    reason = why_dense(parameter.device, parameter.dtype)
    if reason:
        rows = [_dense_row(name, module, reason="") for name, _, module in found]
        return Sparse24Report(batch, length, tuple(rows), reason)
    few = batch * length // 2 if (length > 1 if keep_dense is None else keep_dense) else 0
    rows = []
    for done, (name, mixer, module) in enumerate(found):
        progress("measuring 2:4 modules", done, len(found))
        row, weight = _measure(name, module, batch, length, rounds)
        if row.kept:
            dense = module.weight.detach() if few else None
            setattr(mixer, name.rpartition(".")[2], Sparse24Linear(weight, module.bias, dense, few))
        rows.append(row)
    progress("measuring 2:4 modules", len(found), len(found))
    return Sparse24Report(batch, length, tuple(rows), None)


def modules_24(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Linear]]:
    """The linear maps of all mixers whose weight is 2:4: name, mixer, module."""
    architecture = architecture_for(getattr(model.config, "model_type", None), f"This {type(model).__name__}")
    for layer, block in enumerate(architecture.blocks(model)):
        mixer = architecture.mixer(block)
        if mixer is None:  # a block of a hybrid without one
            continue
        for name, module in mixer.named_children():
            if isinstance(module, nn.Linear) and is_24(module.weight):
                yield architecture.mixer_prefix(layer) + name, mixer, module


def _measure(
    name: str, module: nn.Linear, batch: int, length: int, rounds: int
) -> tuple[ModuleReport, torch.Tensor | None]:
    """One module's row, and its sparse weight if that is to be used."""
    shape = tuple(module.weight.shape)
    if why := obstacle(name.rpartition(".")[2], shape):
        return _dense_row(name, module, why), None
    weights, refused = to_sparse(module.weight.detach())
    x = torch.randn(batch, length, shape[1], generator=torch.Generator().manual_seed(0)).to(module.weight)
    candidates = {backend: Sparse24Linear(weight, module.bias) for backend, weight in weights.items()}
    row = compare(name, module, candidates, x, rounds, refused)
    return row, weights[row.backend] if row.kept else None


@torch.inference_mode()
def compare(
    name: str,
    module: nn.Linear,
    candidates: Mapping[str, Callable[[torch.Tensor], torch.Tensor]],
    x: torch.Tensor,
    rounds: int = ROUNDS,
    refused: Mapping[str, str] | None = None,
) -> ModuleReport:
    """Check and time other ways to compute a linear map, in turns with the dense one.

    Args:
        name: of the module.
        module: the dense one.
        candidates: backend -> what should compute the same.
        x: (B, L, in) what they read.
        rounds: at most.
        refused: backend -> why it is no candidate.
    """
    refused, wanted = dict(refused or {}), module(x)
    ways: dict[str, Callable[[], Any]] = {DENSE: lambda: module(x)}
    for backend, candidate in candidates.items():
        if why := fault(candidate, x, wanted):
            refused[backend] = why
        else:
            ways[backend] = lambda candidate=candidate: candidate(x)
    if len(ways) == 1:
        return _dense_row(name, module, "; ".join(f"{backend}: {why}" for backend, why in refused.items()))
    return choose(name, tuple(module.weight.shape), interleave(ways, x.device, rounds, budget=0.5, sample=SAMPLE))


def choose(name: str, shape: tuple[int, ...], timings: Mapping[str, Timing]) -> ModuleReport:
    """The fastest sparse way of a module, and whether it is faster than the dense one beyond noise.

    Args:
        name: of the module.
        shape: (out, in).
        timings: DENSE and every sparse backend, interleaved.
    """
    dense = timings[DENSE]
    ratios = {backend: paired_ratio(dense, timing) for backend, timing in timings.items() if backend != DENSE}
    best = max(ratios, key=lambda backend: ratios[backend].median)
    kept = ratios[best].verdict == "faster"
    reason = "" if kept else f"sparse is {'slower' if ratios[best].verdict == 'slower' else 'no faster beyond noise'}"
    return ModuleReport(name, shape, best, dense, timings[best], ratios[best], kept, reason)


def fault(candidate: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, wanted: torch.Tensor) -> str | None:
    """Why a candidate cannot stand in for the dense module: it does not run, or computes something else."""
    try:
        got = candidate(x)
    except (RuntimeError, NotImplementedError) as error:
        return first_line(error)
    error = float((got.float() - wanted.float()).norm() / wanted.float().norm())
    return None if error <= LARGEST_ERROR else f"it computes something else (relative error {error:.2g})"


def _dense_row(name: str, module: nn.Linear, reason: str) -> ModuleReport:
    return ModuleReport(name, tuple(module.weight.shape), None, None, None, None, kept=False, reason=reason)
