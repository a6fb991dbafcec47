"""Which design runs a scan of many tokens, and how it is cut: measured on this GPU, measured elsewhere, or estimated.

`plan_for` takes, in this order: what `tune` measured on this machine for a GPU of this name and stored in the user's
cache folder; the table that comes with the package, for GPUs it names; an estimate from the number of multiprocessors.
A stored choice was measured at one number of channels and states and serves those nearest to it.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from math import log2
from pathlib import Path
from typing import Any

import torch
import triton

from ssmc.runtime.scan.gpu import chunks, lanes
from ssmc.runtime.scan.gpu.chunks import WARP, Chunks
from ssmc.runtime.scan.gpu.lanes import Lanes
from ssmc.runtime.scan.inputs import ScanInputs

Plan = Lanes | Chunks
DESIGNS: dict[str, type[Plan]] = {"lanes": Lanes, "chunks": Chunks}
SHIPPED = Path(__file__).parent / "plans.json"
VERSION = 1  # of the file format
MEASURED = 2048  # tokens of the scans that choices were measured with
SCHEDULERS = 4  # of a multiprocessor: each runs one warp at a time
SHORTEST_CHUNK = 16  # tokens
SHORT = 64  # tokens: most of a tile of `lanes` would be empty


@dataclass(frozen=True)
class Choice:
    """The fastest plan of those measured for a number of channels (of all sequences together) and of states."""

    channels: int
    states: int
    plan: Plan
    microseconds: float = 0.0


def stored_path() -> Path:
    """Where `tune` stores what it chose: `ssmc/scan-plans.json` in the user's cache folder (XDG_CACHE_HOME)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssmc" / "scan-plans.json"


def plan_for(inputs: ScanInputs) -> Plan:
    """How to run this scan on the GPU its tensors are on."""
    name, multiprocessors = gpu_of(inputs.u)
    channels = inputs.batch * inputs.d_inner
    if inputs.length < SHORT:
        return chunks_for(channels, inputs.d_state, inputs.length, multiprocessors)
    known = choices(name)
    if known:
        return stretched(nearest(known, channels, inputs.d_state).plan, inputs.length)
    return estimated(channels, inputs.d_state, inputs.length, multiprocessors)


def run(
    inputs: ScanInputs, state: torch.Tensor | None = None, plan: Plan | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scan by this plan, or by the one for it; as `reference.selective_scan`, without gradients."""
    plan = plan or plan_for(inputs)
    design = lanes if isinstance(plan, Lanes) else chunks
    return design.selective_scan(inputs, state, plan)


def nearest(known: Sequence[Choice], channels: int, states: int) -> Choice:
    """The choice measured nearest to so many channels and states: by the ratios of both, those of states first."""
    return min(known, key=lambda c: 2 * abs(log2(c.states / states)) + abs(log2(c.channels / channels)))


def stretched(plan: Plan, length: int) -> Plan:
    """A measured plan for another length: as many chunks as there were, unless they become too short."""
    if isinstance(plan, Lanes):
        return plan
    chunk = max(min(plan.chunk, SHORTEST_CHUNK), triton.cdiv(plan.chunk * length, MEASURED))
    return replace(plan, chunk=triton.cdiv(chunk, plan.tokens) * plan.tokens)


def estimated(channels: int, states: int, length: int, multiprocessors: int) -> Plan:
    """A plan without any measurement: chunks, which beat time along the lanes in most of what was measured."""
    return chunks_for(channels, states, length, multiprocessors)


def chunks_for(channels: int, states: int, length: int, multiprocessors: int) -> Chunks:
    """The cut into chunks whose programs fill a GPU of so many multiprocessors.

    Blocks and tokens keep the decay rates, the states and the rows in flight in registers (docs/gpu_scan.md). A
    scheduler needs several warps to hide what one waits for, and has room for more of them the fewer the states.
    """
    lane = 2 if states <= 16 else 1
    tokens = 4 if states <= 8 or states == 16 else 2 if states <= 32 else 1  # 12 = 8 + 4 states take more registers
    warps = 6 if states <= 4 else 5 if states <= 8 else 4
    block = WARP * lane
    programs = triton.cdiv(channels, block)
    wanted = multiprocessors * SCHEDULERS * warps
    count = 1 if programs >= wanted // 2 else triton.cdiv(wanted, programs)
    chunk = max(SHORTEST_CHUNK, triton.cdiv(length, count))
    return Chunks(block, 1, tokens, triton.cdiv(chunk, tokens) * tokens)


def gpu_of(tensor: torch.Tensor) -> tuple[str, int]:
    """Name and multiprocessors of the GPU a tensor is on; one for the interpreter, which runs one program at a time."""
    if not tensor.is_cuda:
        return "interpreter", 1
    found = torch.cuda.get_device_properties(tensor.device)
    return found.name, found.multi_processor_count


@cache
def choices(gpu: str) -> tuple[Choice, ...]:
    """What was measured for a GPU of this name: on this machine, or what comes with the package; nothing if neither."""
    for path in (stored_path(), SHIPPED):
        if path.is_file():
            try:
                found = read(path).get(gpu)
            except ValueError as error:
                warnings.warn(f"{error} The scan uses other plans; delete the file, or tune again.", stacklevel=2)
                continue
            if found:
                return found
    return ()


def read(path: Path) -> dict[str, tuple[Choice, ...]]:
    """The choices of a file, by the name of the GPU.

    Raises:
        ValueError: it is no such file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']}")
        return {gpu: tuple(map(_choice, rows)) for gpu, rows in content["gpus"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no plans of the scan ({type(error).__name__}: {error}).") from error


def write(path: Path, gpu: str, found: Sequence[Choice]) -> None:
    """Store the choices for one GPU beside those for others; a file that cannot be read is replaced."""
    try:
        known = read(path)
    except ValueError:
        known = {}
    known[gpu] = tuple(found)
    rows = {name: [_row(choice) for choice in known[name]] for name in sorted(known)}
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(f".{os.getpid()}.part")
    whole.write_text(json.dumps({"version": VERSION, "gpus": rows}, indent=1) + "\n", encoding="utf-8")
    whole.replace(path)
    choices.cache_clear()


def _row(choice: Choice) -> dict[str, Any]:
    design = next(name for name, kind in DESIGNS.items() if isinstance(choice.plan, kind))
    return {
        "channels": choice.channels,
        "states": choice.states,
        "microseconds": choice.microseconds,
        "plan": {"design": design, **asdict(choice.plan)},
    }


def _choice(row: dict[str, Any]) -> Choice:
    options = dict(row["plan"])
    kind = DESIGNS[options.pop("design")]
    if not all(isinstance(value, int) and value >= 0 for value in options.values()):
        raise ValueError(f"a plan is made of whole numbers, not {options}")
    channels, states = int(row["channels"]), int(row["states"])
    if channels < 1 or states < 1:
        raise ValueError(f"{channels} channels, {states} states")
    return Choice(channels, states, kind(**options), float(row["microseconds"]))
