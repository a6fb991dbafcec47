"""How many sequences fit beside the weights of a model: exact counts from its sizes, without torch.

Between two tokens a sequence keeps its recurrent state and, in a hybrid, keys and values of every token so far.
transformers holds the SSM states in float32 and everything else in the type of the model, and so does ssmc, which can
also keep states in fewer bits.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmc.runtime.errors import UsageError

if TYPE_CHECKING:
    from ssmc.runtime.models.architectures.dimensions import Dimensions

LENGTH = 4096  # tokens of a sequence where nothing else is said
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)
_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container


@dataclass(frozen=True)
class SequenceMemory:
    """What one sequence keeps between two tokens, in bytes.

    Attributes:
        length: tokens read so far.
        states: SSM states of all layers.
        windows: the last inputs of the convolutions.
        attention: keys and values of `length` tokens; 0 in a model without attention.
    """

    length: int
    states: int
    windows: int
    attention: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.states + self.windows + self.attention


@dataclass(frozen=True)
class Footprint:
    """A model in memory: its weights, once, and what every sequence adds. Activations of a step are not in it."""

    weights: int  # bytes
    sequence: SequenceMemory

    def total(self, batch: int) -> int:
        """Bytes of the weights and so many sequences."""
        return self.weights + batch * self.sequence.total

    def fitting(self, room: Room) -> int | None:
        """How many sequences fit; None where the weights alone do not."""
        left = room.bytes - (self.weights if room.with_weights else 0)
        return None if left < 0 else left // self.sequence.total

    def to_json(self, rooms: Sequence[Room]) -> dict[str, Any]:
        """Everything, with the number of sequences by the name of the room."""
        counts = {room.name: self.fitting(room) for room in rooms}
        return asdict(self) | {"bytes_per_sequence": self.sequence.total, "sequences": counts}


@dataclass(frozen=True)
class Room:
    """So much memory; `with_weights`: the weights have to fit in it, too."""

    name: str
    bytes: int
    with_weights: bool = True


def sequence_memory(
    sizes: Dimensions, kept_per_token: int, length: int, dtype: str, state_dtype: str = "float32"
) -> SequenceMemory:
    """What one sequence keeps after `length` tokens.

    Args:
        sizes: of the model.
        kept_per_token: numbers that attention keeps of every token, as the family says (`Layout.kept_per_token`).
        length: tokens read so far.
        dtype: of the model: "float32", "float16" or "bfloat16".
        state_dtype: of the SSM states, see `ssmc.runtime.scan.rounding`; scales of int8 are counted.
    """
    itemsize, states = ITEMSIZE[dtype], sizes.ssm_numbers * ITEMSIZE[state_dtype]
    if state_dtype == "int8":
        states += sizes.ssm_numbers // sizes.scale_channels * ITEMSIZE["float16"]
    return SequenceMemory(length, states, itemsize * sizes.window_numbers, itemsize * kept_per_token * length)


def rooms(here: int | None = None) -> tuple[Room, ...]:
    """Those that a report names: a GiB, this machine, and common sizes of GPUs in units of 10^9 bytes.

    Args:
        here: bytes that this machine has; None asks it.
    """
    here = machine_memory() if here is None else here
    return (
        Room("1 GiB beside the weights", 2**30, with_weights=False),
        Room(f"this machine ({format_bytes(here)})", here),
        *(Room(f"{size} GB", size * 10**9) for size in (16, 24, 80)),
    )


def machine_memory() -> int:
    """Bytes of memory that this machine has, or this container may use."""
    import psutil

    try:
        limit = int(_LIMIT.read_text(encoding="ascii"))
    except (OSError, ValueError):  # no container, or "max"
        limit = 0
    whole = psutil.virtual_memory().total
    return min(whole, limit) if limit > 0 else whole


def parse_bytes(text: str | int) -> int:
    """Bytes of "8GiB", "512 MiB", "16GB" or a plain number; KB, MB, GB and TB are powers of 1000.

    Raises:
        UsageError: it is no amount of memory.
    """
    match = _AMOUNT.fullmatch(str(text).strip())
    count = 0 if match is None else int(float(match[1]) * (1024 if match[3] else 1000) ** _UNITS[match[2].upper()])
    if match is None or count < 1 or (match[3] and not match[2]):
        raise UsageError(f"{str(text)!r} is no amount of memory. Write a number with its unit, such as 8GiB or 500MB.")
    return count


def format_bytes(count: int) -> str:
    """Bytes in binary units with three digits."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    if units[0] == "B":
        return f"{count} B"
    digits = f"{size:.0f}" if size >= 99.95 else f"{size:.1f}" if size >= 9.995 else f"{size:.2f}"
    return f"{digits} {units[0]}"
