"""What the kinds of layers of a hybrid take, measured once, and what smaller ones would."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch
from torch import nn

from ssmc.compressor.options.patterns import ATTENTION, EXPERT, MLP
from ssmc.compressor.search.given_table import require_same
from ssmc.compressor.search.hybrid_sizes import HybridSizes, Removed
from ssmc.runtime.errors import UsageError
from ssmc.runtime.measure.conditions import conditions, load_average
from ssmc.runtime.measure.latency import Workload, read_table
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.progress import NO_PROGRESS, Progress

TIMED = 15.0  # seconds of all models in turns, a guide
LEAST_ROUNDS, MOST_ROUNDS = 5, 30
REST = "rest"  # embedding, last norm, head
SCHEMA = "ssmc-kinds/1"


@dataclass(frozen=True)
class KindTable:
    """Seconds by kind of layer, for the dense model and for some with less of one axis.

    Attributes:
        seconds: by kind, of all layers of that kind together, and of the rest, in the dense model.
        smaller: axis -> share that was gone, and seconds by kind then.
        conditions: of the measurement.
        model: sizes of the dense model, its parameters among them.
        workload: what was timed.
        device: its type.
        correction: how many times what follows from the seconds whole models took that were timed.
    """

    seconds: Mapping[str, float]
    smaller: Mapping[str, tuple[float, Mapping[str, float]]]
    conditions: Mapping[str, Any]
    model: Mapping[str, int] = field(default_factory=dict)
    workload: Workload = field(default_factory=Workload)
    device: str = "cpu"
    correction: float = 1.0

    def ratio(self, removed: Removed) -> float:
        """Expected time of a model over the dense model's."""
        return self.correction * self.added_up(removed)

    def added_up(self, removed: Removed) -> float:
        """The same by the seconds of kinds of layers alone.

        A kind of layer gets faster by each axis as it was measured, in proportion to the share that is gone; axes of
        one kind multiply.
        """
        total = 0.0
        for kind, seconds in self.seconds.items():
            for axis, share in removed.shares:
                gone, found = self.smaller[axis]
                seconds *= max(0.05, 1 - (1 - found[kind] / self.seconds[kind]) * share / gone)
            total += seconds
        return total / sum(self.seconds.values())

    def to_json(self) -> dict[str, Any]:
        """Everything in types JSON has."""
        return {"schema": SCHEMA, **asdict(self)}


def sizes_of(sizes: HybridSizes) -> dict[str, int]:
    """What tells a dense model from others, for a table."""
    return {**sizes.sizes.as_dict(), "parameters": sizes.parameters}


def read_kind_table(path: str, sizes: HybridSizes, workload: Workload, device: torch.device) -> KindTable:
    """A table that an earlier search over the same model wrote into its manifest, taken at its word.

    Raises:
        UsageError: it cannot be read, is none, or is for something else.
    """
    other = "no latency table of a hybrid of this version of ssmc. Name the ssmc.json of a search over one."
    table = read_table(path, SCHEMA, _made, other)
    require_same(
        path,
        ("a model of", dict(table.model), sizes_of(sizes)),
        ("", str(table.workload), str(workload)),
        ("the device", table.device, device.type),
    )
    if lacking := [axis for axis in sizes.axes if axis not in table.smaller]:
        raise UsageError(
            f"The latency table {path} has no times with fewer {', '.join(lacking)}. Leave that out of --pattern, or "
            "leave the table out, and a new one is measured."
        )
    return table


def _made(record: dict[str, Any]) -> KindTable:
    record["smaller"] = {axis: (float(gone), dict(found)) for axis, (gone, found) in record["smaller"].items()}
    table = KindTable(**record)
    _check(table)
    return table


def _check(table: KindTable) -> None:
    """Whether a table has all numbers that are read from it.

    Raises:
        ValueError: it has not.
    """
    several = [table.seconds, *(found for _, found in table.smaller.values())]
    numbers = [value for seconds in several for value in seconds.values()]
    numbers += [*(gone for gone, _ in table.smaller.values()), table.correction]
    if not table.seconds or any(seconds.keys() != table.seconds.keys() for seconds in several):
        raise ValueError("kinds of layers are missing")
    if not all(isinstance(number, int | float) and 0 < number < math.inf for number in numbers):
        raise ValueError("a time that is none")


def measure_kinds(
    sizes: HybridSizes, workload: Workload, device: torch.device, progress: Progress = NO_PROGRESS
) -> KindTable:
    """Time stock models of random weights, the dense one and one with less of each axis, layer by layer, in turns."""
    from transformers import AutoModelForCausalLM

    shares: dict[str, float] = {}
    configs = {"": sizes.config}
    for axis in sizes.axes:
        shares[axis] = min(sizes.alone(axis), key=lambda share: abs(share - 0.5))
        configs[axis] = sizes.smaller(Removed(((axis, shares[axis]),)))
    torch.manual_seed(0)
    models = {
        axis: use_fast_scan(AutoModelForCausalLM.from_config(c, dtype=torch.float32).eval().to(device))
        for axis, c in configs.items()
    }
    clocks = {axis: _Clocks(sizes, model, workload) for axis, model in models.items()}
    rounds = _in_turns(clocks, progress)
    dense = {kind: median(taken[""][kind] for taken in rounds) for kind in rounds[0][""]}
    smaller = {axis: (share, _seconds(axis, clocks, rounds, dense)) for axis, share in shares.items()}
    told = asdict(conditions(device, torch.float32, load_average()))
    return KindTable(dense, smaller, told, sizes_of(sizes), workload, device.type)


_Round = dict[str, dict[str, float]]  # by axis, seconds by kind


def _in_turns(clocks: Mapping[str, _Clocks], progress: Progress) -> list[_Round]:
    """Run all models in turns, there and back, for about `TIMED` seconds; the first, untimed, warms up."""
    rounds: list[_Round] = []
    begun = time.perf_counter()
    for clock in clocks.values():
        clock.run()
    count = int(min(MOST_ROUNDS, max(LEAST_ROUNDS, TIMED / (time.perf_counter() - begun))))
    for done in range(count):
        progress("time by kind of layer", done, count)
        order = list(clocks)
        rounds.append({axis: clocks[axis].run() for axis in (order if done % 2 else reversed(order))})
    return rounds


def _seconds(
    axis: str, clocks: Mapping[str, _Clocks], rounds: Sequence[_Round], dense: Mapping[str, float]
) -> dict[str, float]:
    """Seconds by kind with less of an axis: those of the dense model, times the median of what each round says.

    What has as many parameters takes as long, and what has fewer no longer; all else is noise.
    """
    found = {}
    for kind, seconds in dense.items():
        ratio = median(taken[axis][kind] / taken[""][kind] for taken in rounds)
        same = clocks[axis].parameters[kind] == clocks[""].parameters[kind]
        found[kind] = seconds if same else seconds * min(1.0, ratio)
    return found


class _Clocks:
    """A model with clocks around its layers."""

    def __init__(self, sizes: HybridSizes, model: nn.Module, workload: Workload):
        self.work = workload.on(model)
        self.taken: dict[str, float] = {}
        self.calls = workload.calls or 1
        self.parameters = {REST: sum(p.numel() for p in model.parameters())}  # by kind
        for block in sizes.architecture.blocks(model):
            kind, count = kind_of(sizes, block), sum(p.numel() for p in block.parameters())
            self.parameters[kind] = self.parameters.get(kind, 0) + count
            self.parameters[REST] -= count
            self._watch(block, kind)

    def _watch(self, block: nn.Module, kind: str) -> None:
        begun = [0.0]

        def before(*_: Any) -> None:
            _settle(block)
            begun[0] = time.perf_counter()

        def after(*_: Any) -> None:
            _settle(block)
            self.taken[kind] = self.taken.get(kind, 0.0) + time.perf_counter() - begun[0]

        block.register_forward_pre_hook(before)
        block.register_forward_hook(after)

    @torch.no_grad()
    def run(self) -> dict[str, float]:
        """Seconds by kind, and of the rest."""
        self.taken = {}
        begun = time.perf_counter()
        for _ in range(self.calls):
            self.work()
        whole = time.perf_counter() - begun
        return self.taken | {REST: max(whole - sum(self.taken.values()), 1e-9)}


def kind_of(sizes: HybridSizes, block: nn.Module) -> str:
    """What is in a block: "mixer", "attention", "mlp", "expert", or several of them, with + between."""
    found = ["mixer"] if sizes.architecture.mixer(block) is not None else []
    for kind in (ATTENTION, MLP, EXPERT):
        if any(part.kind == kind and part.inside(block) is not None for part in sizes.architecture.units):
            found.append(kind)
    return "+".join(found) or "other"


def _settle(block: nn.Module) -> None:
    if next(block.parameters()).is_cuda:
        torch.cuda.synchronize()
