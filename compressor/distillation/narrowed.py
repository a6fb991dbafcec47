"""A masked model computed without what was masked: the same numbers for less time and memory, while it takes steps.

Blocks are replaced by narrow copies, blocks that were removed by nothing at all; after the steps the narrow weights go
back to their places in the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ssmc.runtime.models import families
from ssmc.runtime.models.families import Architecture


@dataclass(frozen=True)
class Left:
    """What is left of a layer.

    Attributes:
        states: those that stay, numbered over all groups.
        channels: those that stay; None: all.
    """

    states: tuple[int, ...]
    channels: tuple[int, ...] | None = None


@contextmanager
def narrowed(
    architecture: Architecture, model: nn.Module, layers: Sequence[Left], write_back: bool = True
) -> Iterator[None]:
    """Inside the block `model` has only what is left of each layer; after it, its own shapes and the new weights.

    States are left out where no norm takes its mean over them. A hybrid stays as it is.

    Args:
        architecture: adapter of the model.
        model: masked; its fast scan, if in use, stays in use.
        layers: what is left; none where whole layers alone were removed.
        write_back: whether the new weights are kept.
    """
    blocks: Any = architecture.blocks(model)  # a ModuleList
    whole = list(blocks)
    able = architecture.capabilities.uniform and not architecture.capabilities.shared_blocks
    sizes = architecture.dimensions(model.config)
    full = {families.CHANNEL: sizes.d_inner, families.STATE: sizes.groups * sizes.d_state}
    steps: dict[int, list[_Step]] = {}
    for index, block in enumerate(whole if able else []):
        if architecture.is_removed(block):
            blocks[index] = _HandsOn()
        elif layers and (taken := _narrow(architecture, block, layers[index], full)):
            steps[index], blocks[index] = taken, taken[-1].narrow
    try:
        yield
    finally:
        for index, block in enumerate(whole):
            blocks[index] = block
        with torch.no_grad():
            for index, taken in steps.items() if write_back else ():
                _widen(architecture, whole[index], taken)


@dataclass(frozen=True)
class _Step:
    """A block, and the same with less of a dimension."""

    block: nn.Module
    narrow: nn.Module
    dimension: str
    kept: tuple[int, ...]


class _HandsOn(nn.Module):
    """A removed block of a stack: it puts out what it reads."""

    def forward(self, hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """(B, L, d_model) to the same."""
        return hidden


def _narrow(architecture: Architecture, block: nn.Module, left: Left, full: Mapping[str, int]) -> list[_Step]:
    """The narrow block, in as many steps as it has dimensions with less than all of them; `full` says how many."""
    found: list[_Step] = []
    if architecture.mixer(block) is None:
        return found
    wanted = [(families.CHANNEL, left.channels)]
    if not architecture.capabilities.normed_readers:
        wanted.append((families.STATE, left.states))
    for dimension, kept in wanted:
        before = found[-1].narrow if found else block
        if kept and len(kept) < full[dimension]:
            found.append(_Step(before, architecture.narrow(before, dimension, kept), dimension, tuple(kept)))
    return found


def _widen(architecture: Architecture, whole: nn.Module, steps: Sequence[_Step]) -> None:
    """Write a narrow block back into the whole one it came from."""
    for step in reversed(steps):
        narrow = dict(step.narrow.named_parameters())
        for name, parameter in step.block.named_parameters():
            if parameter.shape == narrow[name].shape:  # all that does not have the dimension
                parameter.copy_(narrow[name])
        architecture.widen(step.block, step.narrow, step.dimension, step.kept)
