"""How long a model of other sizes would take on this device: a latency table, measured once, and what follows from it.

The parts are timed where they run: whole models of several widths and state counts read the prompt or take a step in
turns, with clocks before their first block and after their last. So a block's time includes fetching its weights from
where the other layers left them, which a block timed alone in a warm cache would hide. Between the measured sizes a
block's time is interpolated; everything outside the blocks (embedding, last norm, head) has the same size in every
model and is one number.
"""

from __future__ import annotations

import json
import math
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from torch import nn

from ssmc.runtime.errors import UsageError
from ssmc.runtime.files import write_text
from ssmc.runtime.measure import workloads
from ssmc.runtime.measure.conditions import conditions, load_average
from ssmc.runtime.measure.phases import PHASES, workload_text
from ssmc.runtime.measure.timing import K, Ratio, interleave, paired_ratio
from ssmc.runtime.models.architectures.dimensions import from_dict
from ssmc.runtime.models.families import Architecture, Dimensions
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.progress import NO_PROGRESS, Progress

SCHEMA = "ssmc-latency/1"

T = TypeVar("T")
STACK_BYTES = 512 << 20
"""Weights of blocks that one timed model has at most, beyond the first two blocks: more than most caches hold."""

DECODE_STEPS = 8
"""Steps one sample of decoding is the mean of; one more goes before it, since other models used the cache."""


@dataclass(frozen=True)
class Workload:
    """What is timed.

    Attributes:
        phase: "prefill" (L tokens into a fresh cache, logits of the last) or "decode" (one token of every sequence).
        batch: sequences at once.
        length: tokens of a prompt; does not matter in decoding.
    """

    phase: str = "prefill"
    batch: int = 1
    length: int = 512

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise UsageError(f"There is no phase {self.phase!r}: choose {' or '.join(PHASES)}.")
        for name in ("batch", "length"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}.")

    def __str__(self) -> str:
        return workload_text(self.phase, self.batch, self.length)

    def on(self, model: nn.Module) -> Callable[[], torch.Tensor]:
        """The workload on a model, as a callable without arguments."""
        if self.phase == "decode":
            return workloads.decode(model, self.batch)
        return workloads.prefill(model, self.batch, self.length)

    @property
    def calls(self) -> int | None:
        """Calls a timed sample is the mean of; None leaves it to `interleave`."""
        return DECODE_STEPS if self.phase == "decode" else None


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of one block by width and number of states, and of all the rest, on one device.

    Attributes:
        dimensions: of the dense model.
        workload: what was timed.
        device: "cpu" or "cuda".
        dtype: of weights and activations, "float32".
        widths: d_inner of the measured blocks, rising.
        states: d_state of the measured blocks, rising.
        block: seconds of one block, `block[i][j]` at `widths[i]` and `states[j]`.
        rest: seconds of everything outside the blocks.
        depth: blocks of the timed models.
        rounds: interleaved rounds every figure is the median of.
        conditions: of the measurement.
    """

    dimensions: Dimensions
    workload: Workload
    device: str
    dtype: str
    widths: tuple[int, ...]
    states: tuple[int, ...]
    block: tuple[tuple[float, ...], ...]
    rest: float
    depth: int
    rounds: int
    conditions: dict[str, Any]

    def block_seconds(self, width: int, states: int) -> float:
        """Seconds of one block, linear between the measured sizes along either axis.

        Raises:
            ValueError: the sizes lie outside the table.
        """
        i, across = _place(self.widths, width)
        j, along = _place(self.states, states)
        low, high = (row[j] + along * (row[j + 1] - row[j]) if along else row[j] for row in self._rows(i))
        return low + across * (high - low)

    def seconds(self, sizes: Sequence[tuple[int, int]]) -> float:
        """Seconds of a whole model, given (d_inner, d_state) of each of its blocks."""
        blocks = {size: self.block_seconds(*size) for size in set(sizes)}
        return self.rest + sum(blocks[size] for size in sizes)

    @property
    def dense(self) -> float:
        """Seconds of the dense model."""
        sizes = self.dimensions
        return self.rest + sizes.n_layer * self.block_seconds(sizes.d_inner, sizes.d_state)

    def ratio(self, sizes: Sequence[tuple[int, int]]) -> float:
        """Time of a model over the dense model's: below 1 is faster."""
        return self.seconds(sizes) / self.dense

    def to_json(self) -> dict[str, Any]:
        """Everything in types JSON has."""
        return {"schema": SCHEMA, **asdict(self)}

    def write(self, path: str | Path) -> None:
        """Write the table to a file that `read_latency_table` reads."""
        write_text(path, json.dumps(self.to_json(), indent=1) + "\n")

    def _rows(self, i: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return self.block[i], self.block[min(i + 1, len(self.block) - 1)]


def read_latency_table(path: str | Path) -> LatencyTable:
    """A table that an earlier run wrote, to a file of its own or into its manifest.

    Raises:
        UsageError: it cannot be read, or is none.
    """
    return read_table(path, SCHEMA, _made, "no latency table of this version of ssmc. Name one that it wrote.")


def read_table(path: str | Path, schema: str, made: Callable[[dict[str, Any]], T], other: str) -> T:
    """A table of times of any kind, from a file of its own or from the manifest of the run that measured it.

    Args:
        path: of the file.
        schema: of the table.
        made: the table from its record, which it may change; fails by an ordinary exception where it is none.
        other: what a file is that holds none, and what to do.

    Raises:
        UsageError: it cannot be read, or is none.
    """
    path = Path(path).expanduser()
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        search = record.get("goal") or record.get("target") or {}  # of the manifest of a run; "target" in 0.1
        record = search.get("latency_table") or record
        if record.pop("schema") != schema:
            raise ValueError("another format")
        record["workload"] = Workload(**record["workload"])
        return made(record)
    except OSError as error:
        raise UsageError(f"The latency table {path} cannot be read: {error.strerror}. Name one ssmc wrote.") from error
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UsageError(f"{path} is {other}") from error


def _made(record: dict[str, Any]) -> LatencyTable:
    record["dimensions"] = from_dict(record["dimensions"])
    record["block"] = tuple(tuple(float(value) for value in row) for row in record["block"])
    record["widths"], record["states"] = tuple(record["widths"]), tuple(record["states"])
    table = LatencyTable(**record)
    _check(table)
    return table


def measure_latency(
    model: nn.Module,
    architecture: Architecture,
    workload: Workload,
    *,
    widths: Sequence[int] | None = None,
    states: Sequence[int] | None = None,
    repeats: int = 15,
    budget: float = 30.0,
    progress: Progress = NO_PROGRESS,
) -> LatencyTable:
    """Time models of several sizes, cut out of `model` wherever its numbers happen to lie, in turns.

    Args:
        model: the dense model, on the device and in the dtype to measure; it is not changed.
        architecture: its adapter.
        workload: what to time.
        widths: d_inner to measure, rising up to the model's own; None: see `grid_widths`.
        states: d_state to measure, rising up to the model's own; None: see `grid_states`.
        repeats: rounds at most.
        budget: seconds for all rounds together, a guide.
        progress: told about models and rounds.
    """
    dense = architecture.dimensions(model.config)
    device = model.get_input_embeddings().weight.device
    widths, states = tuple(widths or grid_widths(dense.d_inner)), tuple(states or grid_states(dense.d_state))
    depth = _depth(model, architecture)
    load = load_average()
    parts: dict[tuple[int, int], _Parts] = {}
    for width in widths:
        for count in states:
            progress("cutting models to time", len(parts), len(widths) * len(states))
            parts[width, count] = _Parts(cut_to_size(model, architecture, depth, width, count), architecture, device)
    runs = {size: _counted(part, workload) for size, part in parts.items()}
    warm = runs if workload.phase == "decode" else None
    watched = _watched(runs, progress, repeats)
    timings = interleave(watched, device, repeats, budget, calls=workload.calls, prepare=warm)
    reference = timings[dense.d_inner, dense.d_state]
    seconds = {size: paired_ratio(timing, reference).median * reference.median for size, timing in timings.items()}
    inside = {size: part.share() for size, part in parts.items()}
    return LatencyTable(
        dimensions=dense,
        workload=workload,
        device=device.type,
        dtype=str(model.dtype).removeprefix("torch."),
        widths=widths,
        states=states,
        block=tuple(tuple(seconds[w, n] * inside[w, n] / depth for n in states) for w in widths),
        rest=median(seconds[size] * (1 - inside[size]) for size in seconds),
        depth=depth,
        rounds=len(reference.seconds),
        conditions=asdict(conditions(device, model.dtype, load)),
    )


def time_sizes(
    model: nn.Module,
    architecture: Architecture,
    sizes: Sequence[Sequence[tuple[int, int]]],
    workload: Workload,
    *,
    repeats: int = 15,
    budget: float = 30.0,
    progress: Progress = NO_PROGRESS,
) -> list[Ratio]:
    """What whole models of other sizes really take, over the dense model's time, all in turns: below 1 is faster.

    Args:
        model: the dense model, on the device and in the dtype to measure; it is not changed.
        architecture: its adapter.
        sizes: (d_inner, d_state) of every block of each.
        workload: what to time.
        repeats: rounds at most.
        budget: seconds for all rounds together, a guide.
        progress: told about rounds.
    """
    dense = architecture.dimensions(model.config)
    whole = [(dense.d_inner, dense.d_state)] * dense.n_layer
    wanted = dict.fromkeys([tuple(whole), *map(tuple, sizes)])
    runs = {blocks: workload.on(cut_to_blocks(model, architecture, blocks)) for blocks in wanted}
    device = model.get_input_embeddings().weight.device
    prepare = runs if workload.phase == "decode" else None
    watched = _watched(runs, progress, repeats)
    timings = interleave(watched, device, repeats, budget, calls=workload.calls, prepare=prepare)
    reference = timings[next(iter(wanted))]
    return [paired_ratio(timings[tuple(blocks)], reference) for blocks in sizes]


def cut_to_size(model: nn.Module, architecture: Architecture, n_layer: int, d_inner: int, d_state: int) -> nn.Module:
    """A model of smaller sizes around the leading numbers of every tensor of `model`, with our scan: right for timing
    and for nothing else. What keeps its size is shared, not copied."""
    smaller = _empty(model, architecture, n_layer, d_inner, d_state)
    _fill(smaller, model)
    smaller.tie_weights()
    return use_fast_scan(smaller.eval())


def cut_to_blocks(model: nn.Module, architecture: Architecture, sizes: Sequence[tuple[int, int]]) -> nn.Module:
    """As `cut_to_size`, with (d_inner, d_state) of each block by itself."""
    cut, dense = cut_to_size(model, architecture, len(sizes), *max(sizes)), architecture.blocks(model)
    blocks: Any = architecture.blocks(cut)  # a ModuleList
    for size in set(sizes) - {max(sizes)}:
        other = architecture.blocks(_empty(model, architecture, len(sizes), *size).eval())
        for index in (i for i, own in enumerate(sizes) if own == size):
            _fill(other[index], dense[index])
            blocks[index] = other[index]
    return use_fast_scan(cut)


def _empty(model: nn.Module, architecture: Architecture, n_layer: int, d_inner: int, d_state: int) -> nn.Module:
    """A model of other sizes without memory for its weights."""
    with torch.device("meta"):
        return type(model)(architecture.resized(model.config, n_layer=n_layer, d_inner=d_inner, d_state=d_state))


def _fill(smaller: nn.Module, module: nn.Module) -> None:
    """Give `smaller` the leading numbers of the tensors of `module`."""
    numbers, state = module.state_dict(), {}
    for name, tensor in smaller.state_dict().items():
        part = numbers[name][tuple(slice(0, size) for size in tensor.shape)]
        state[name] = part if part.is_contiguous() else part.contiguous()
    smaller.load_state_dict(state, assign=True)


def grid_widths(d_inner: int) -> tuple[int, ...]:
    """The widths to measure: d_inner in quarters, rounded to multiples of 64, or of less where d_inner is none."""
    step = next(step for step in (64, 32, 16, 8, 4, 2, 1) if d_inner % step == 0 and 4 * step <= max(4, d_inner))
    return tuple(sorted({max(step, round(d_inner * k / 4 / step) * step) for k in (1, 2, 3, 4)}))


def grid_states(d_state: int) -> tuple[int, ...]:
    """The numbers of states to measure: one, a quarter, a half and all of d_state."""
    return tuple(sorted({1, max(1, d_state // 4), max(1, d_state // 2), d_state}))


class _Parts:
    """A model with clocks before its first block and after its last; what they showed in every call."""

    def __init__(self, model: nn.Module, architecture: Architecture, device: torch.device):
        self.model = model
        self.calls: list[tuple[Any, Any, Any, Any]] = []  # start, blocks begin, blocks end, end
        self._cuda = device.type == "cuda"
        self._begin = self._end = None
        blocks = architecture.blocks(model)
        blocks[0].register_forward_pre_hook(self._at_begin)
        blocks[-1].register_forward_hook(self._at_end)

    def share(self) -> float:
        """The part of the time that passes inside the blocks: the median over all calls but the first two."""
        seen = self.calls[2:] or self.calls
        return median(_between(c[1], c[2]) / _between(c[0], c[3]) for c in seen)

    def now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def record(self, run: Callable[[], object]) -> None:
        start = self.now()
        run()
        self.calls.append((start, self._begin, self._end, self.now()))

    def _at_begin(self, *_: Any) -> None:
        self._begin = self.now()

    def _at_end(self, *_: Any) -> None:
        self._end = self.now()


def _between(start: Any, end: Any) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end)


def _counted(part: _Parts, workload: Workload) -> Callable[[], None]:
    run = workload.on(part.model)
    part.calls.clear()  # decoding reads its prompt while it is set up
    return lambda: part.record(run)


def _watched(runs: Mapping[K, Callable[[], object]], progress: Progress, repeats: int) -> dict[K, Callable[[], object]]:
    """The same callables, the first of which reports about how many rounds have begun."""
    first = next(iter(runs))
    calls = 0

    def report() -> None:
        nonlocal calls
        progress("timing models of several sizes", min(calls, repeats), repeats)
        calls += 1
        runs[first]()

    return {**runs, first: report}


def _depth(model: nn.Module, architecture: Architecture) -> int:
    """Blocks of a timed model: all of them unless their weights take more than STACK_BYTES."""
    blocks = architecture.blocks(model)
    size = sum(p.numel() * p.element_size() for p in blocks[0].parameters())
    return min(len(blocks), max(2, STACK_BYTES // size))


def _place(grid: Sequence[int], value: int) -> tuple[int, float]:
    """The grid point at or below a value, and how far it lies towards the next, in [0, 1)."""
    if not grid[0] <= value <= grid[-1]:
        raise ValueError(f"{value} lies outside the measured sizes {grid[0]} to {grid[-1]}")
    i = bisect_right(grid, value) - 1
    return (i, 0.0) if i == len(grid) - 1 else (i, (value - grid[i]) / (grid[i + 1] - grid[i]))


def _check(table: LatencyTable) -> None:
    """Raise ValueError unless the figures make a table."""
    rising = all(list(grid) == sorted(set(grid)) and grid for grid in (table.widths, table.states))
    shaped = len(table.block) == len(table.widths) and all(len(row) == len(table.states) for row in table.block)
    positive = all(0 < value < math.inf for row in table.block for value in row) and 0 <= table.rest < math.inf
    positive = positive and all(isinstance(size, int) and size > 0 for size in table.dimensions.as_dict().values())
    whole = table.widths[-1] == table.dimensions.d_inner and table.states[-1] == table.dimensions.d_state
    if not (rising and shaped and positive and whole):
        raise ValueError("the figures do not make a table")
