"""A mixer by itself, whatever class and model it belongs to: found by its parameters, seen by transformers' names.

transformers, mamba_ssm and mamba-minimal name a mixer's parameters alike and its sizes differently. So the sizes are
read off the shapes of the parameters. A family that can be found so says which parts it has and how they fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Protocol

from ssmc.runtime.later import nn, torch
from ssmc.runtime.models.architectures.interface import Architecture

CONFIGURATIONS = ("config", "args")
"""Attributes of a mixer that may hold its sizes."""

STATE_NAMES = ("ssm_state_size", "state_size", "d_state", "mamba_d_state")
CHANNEL_NAMES = ("intermediate_size", "d_inner", "d_ssm")


class LoneMixer(Architecture, Protocol):
    """A family whose mixers can be found anywhere; the mixer is a block of its own and reads what it is called with."""

    parts: tuple[str, ...]  # parameters, or modules with a weight, that such a mixer has

    def read_sizes(self, mixer: nn.Module) -> SimpleNamespace | str:
        """The sizes as a configuration of transformers names them, or why the shapes do not belong together."""

    def describe(self, view: nn.Module, own: nn.Module, sizes: Any) -> None:
        """Give a view of a mixer, which has its parts already, the attributes that `Mixing` reads."""

    def other_sizes(self, sizes: Any) -> dict[tuple[str, ...], int]:
        """Further sizes that change with states and channels, by the names they go by in mixers."""


class Alone:
    """Layout of a single mixer; it comes before the class of the family."""

    def normed(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """What a mixer is called with, (B, L, d_model)."""
        return hidden.to(block.mixer.in_proj.weight.dtype)

    def mixer_prefix(self, layer: int) -> str:
        """A mixer's tensors by their own names."""
        return ""

    def other_sizes(self, sizes: Any) -> dict[tuple[str, ...], int]:
        """None but states and channels."""
        return {}


def misfit(mixer: nn.Module, wanted: dict[str, tuple[int, ...]]) -> str | None:
    """The first part whose shape does not belong to the others, in words."""
    for name, shape in wanted.items():
        part = getattr(mixer, name)
        tensor = part if isinstance(part, torch.Tensor) else part.weight
        if tuple(tensor.shape) != shape:
            return f"with {name} of shape {tuple(tensor.shape)}, not {shape}"
    return None


def stated(mixer: nn.Module, names: Sequence[str]) -> Any:
    """The first attribute of these names that a mixer or its configuration has."""
    holders = [mixer, *(getattr(mixer, name, None) for name in CONFIGURATIONS)]
    return next((getattr(h, name) for h in holders for name in names if getattr(h, name, None) is not None), None)
