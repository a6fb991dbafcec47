"""Mamba and Mamba-2 mixers wherever they sit: found by their parameters, whatever class and model they belong to.

transformers, mamba_ssm and mamba-minimal name a mixer's parameters alike and its sizes differently. So the sizes are
read off the shapes of the parameters, and an adapter of this package sees a mixer through a view that has the names
transformers uses and the mixer's own parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ssmc.runtime.errors import CheckpointError
from ssmc.runtime.models.families.base import Architecture, Cut, Dimensions
from ssmc.runtime.models.families.mamba import MambaArchitecture
from ssmc.runtime.models.families.mamba2 import Mamba2Architecture

LAYOUTS = {
    "mamba": ("in_proj", "conv1d", "x_proj", "dt_proj", "A_log", "D", "out_proj"),
    "mamba2": ("in_proj", "conv1d", "dt_bias", "A_log", "D", "norm", "out_proj"),
}
"""What a mixer has, by family. Gated delta nets have an A_log too, but no D and no in_proj of this shape."""

_STATES = ("ssm_state_size", "state_size", "d_state", "mamba_d_state")
_CHANNELS = ("intermediate_size", "d_inner", "d_ssm")
_GROUPS = ("n_groups", "ngroups")
_LIMITS = ("time_step_limit", "dt_limit")
_CONFIGURATIONS = ("config", "args")  # attributes of a mixer that may hold its sizes


class _Alone:
    """A mixer by itself is its own block and reads what it is called with."""

    def normed(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """What a mixer is called with, (B, L, d_model)."""
        return hidden.to(block.mixer.in_proj.weight.dtype)

    def mixer_prefix(self, layer: int) -> str:
        """A mixer's tensors by their own names."""
        return ""


class _MambaAlone(_Alone, MambaArchitecture):
    """Adapter for one Mamba-1 mixer."""


class _Mamba2Alone(_Alone, Mamba2Architecture):
    """Adapter for one Mamba-2 mixer."""


_ADAPTERS: dict[str, Architecture] = {"mamba": _MambaAlone(), "mamba2": _Mamba2Alone()}


@dataclass(frozen=True)
class Mixer:
    """A mixer inside some module."""

    name: str  # in that module
    module: nn.Module
    family: str  # "mamba" or "mamba2"
    sizes: Any  # as a configuration of transformers names them

    @property
    def architecture(self) -> Architecture:
        """The adapter, for which the mixer is a block of its own."""
        return _ADAPTERS[self.family]

    @property
    def dimensions(self) -> Dimensions:
        """The sizes as one layer."""
        return self.architecture.dimensions(self.sizes)

    def block(self) -> nn.Module:
        """The mixer as the adapter wants it; its parameters are the mixer's own."""
        block = nn.Module()
        block.mixer = _view(self)
        return block


def find_mixers(module: nn.Module) -> list[Mixer]:
    """All Mamba and Mamba-2 mixers in a module, each once, in the order they are registered.

    Raises:
        CheckpointError: there is none; the message says what was looked for and what came near.
    """
    found, near = [], []
    for name, candidate in module.named_modules():
        missing = {family: _missing(candidate, parts) for family, parts in LAYOUTS.items()}
        family = next((family for family, parts in missing.items() if not parts), None)
        reason = None
        if family is not None:
            sizes = _SIZES[family](candidate)
            if not isinstance(sizes, str):
                found.append(Mixer(name, candidate, family, sizes))
                continue
            reason = sizes
        elif hasattr(candidate, "A_log"):
            reason = "without " + ", ".join(min(missing.values(), key=len))
        if reason is not None:
            near.append(f"{type(candidate).__name__} {reason}")
    if not found:
        raise CheckpointError(_nothing(module, near))
    return found


def _nothing(module: nn.Module, near: Sequence[str]) -> str:
    looked = "; ".join(f"{', '.join(parts)} ({family})" for family, parts in LAYOUTS.items())
    came = f" Not taken: {'; '.join(dict.fromkeys(near))}." if near else ""
    return (
        f"There is no Mamba or Mamba-2 mixer in this {type(module).__name__}: no part of it has {looked}, with shapes "
        f"that belong together.{came} Give a module that contains one."
    )


def _missing(candidate: nn.Module, parts: Sequence[str]) -> list[str]:
    """The parts a module lacks: parameters, or modules with a weight."""

    def there(name: str) -> bool:
        part = getattr(candidate, name, None)
        return isinstance(part if isinstance(part, torch.Tensor) else getattr(part, "weight", None), nn.Parameter)

    return [name for name in parts if not there(name)]


def _mamba_sizes(mixer: nn.Module) -> SimpleNamespace | str:
    """The sizes of a Mamba-1 mixer, or why its parameters do not make one."""
    if mixer.A_log.dim() != 2:
        return f"with A_log of shape {tuple(mixer.A_log.shape)}, not (D, N)"
    (d_inner, states), d_model = mixer.A_log.shape, mixer.in_proj.weight.shape[-1]
    rank, width = mixer.dt_proj.weight.shape[-1], mixer.conv1d.weight.shape[-1]
    wanted = {"in_proj": (2 * d_inner, d_model), "conv1d": (d_inner, 1, width), "dt_proj": (d_inner, rank)}
    wanted |= {"x_proj": (rank + 2 * states, d_inner), "D": (d_inner,), "out_proj": (d_model, d_inner)}
    if mixer.dt_proj.bias is None:
        return "without a bias of dt_proj"
    return _misfit(mixer, wanted) or SimpleNamespace(
        num_hidden_layers=1,
        hidden_size=d_model,
        intermediate_size=d_inner,
        state_size=states,
        time_step_rank=rank,
        conv_kernel=width,
        vocab_size=0,
    )


def _mamba2_sizes(mixer: nn.Module) -> SimpleNamespace | str:
    """The sizes of a Mamba-2 mixer, or why its parameters do not make one."""
    if mixer.A_log.dim() != 1:
        return f"with A_log of shape {tuple(mixer.A_log.shape)}, not (H,)"
    heads, (d_model, d_inner) = len(mixer.A_log), mixer.out_proj.weight.shape
    channels, width = mixer.conv1d.weight.shape[0], mixer.conv1d.weight.shape[-1]
    readers = channels - d_inner  # B and C of all groups
    groups = _stated(mixer, _GROUPS) or max(1, readers // 2 // (_stated(mixer, _STATES) or max(1, readers // 2)))
    wanted = {"in_proj": (d_inner + channels + heads, d_model), "conv1d": (channels, 1, width), "D": (heads,)}
    wanted |= {"dt_bias": (heads,), "norm": (d_inner,)}
    if misfit := _misfit(mixer, wanted):
        return misfit
    if readers <= 0 or readers % (2 * groups) or d_inner % heads or heads % groups:
        return f"with {channels} channels of conv1d, {d_inner} of out_proj, {heads} heads and {groups} groups"
    if getattr(mixer.norm, "norm_before_gate", False):
        return "with a norm before the gate"
    return SimpleNamespace(
        num_hidden_layers=1,
        hidden_size=d_model,
        intermediate_size=d_inner,
        expand=Fraction(d_inner, d_model),
        state_size=readers // (2 * groups),
        num_heads=heads,
        head_dim=d_inner // heads,
        n_groups=groups,
        conv_kernel=width,
        vocab_size=0,
    )


_SIZES: dict[str, Callable[[nn.Module], SimpleNamespace | str]] = {"mamba": _mamba_sizes, "mamba2": _mamba2_sizes}


def _misfit(mixer: nn.Module, wanted: dict[str, tuple[int, ...]]) -> str | None:
    """The first part whose shape does not belong to the others, in words."""
    for name, shape in wanted.items():
        part = getattr(mixer, name)
        tensor = part if isinstance(part, torch.Tensor) else part.weight
        if tuple(tensor.shape) != shape:
            return f"with {name} of shape {tuple(tensor.shape)}, not {shape}"
    return None


def _stated(mixer: nn.Module, names: Sequence[str]) -> Any:
    """The first attribute of these names that a mixer or its configuration has."""
    holders = [mixer, *(getattr(mixer, name, None) for name in _CONFIGURATIONS)]
    return next((getattr(h, name) for h in holders for name in names if getattr(h, name, None) is not None), None)


class _Norm(nn.Module):
    """A gated norm of another library, with transformers' name for its epsilon."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.own = norm
        self.variance_epsilon = norm.eps

    @property
    def weight(self) -> nn.Parameter:
        return self.own.weight

    def forward(self, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return self.own(y, gate)


def _view(mixer: Mixer) -> nn.Module:
    """A module with a mixer's own parameters and the attributes that adapters read, by transformers' names."""
    own, sizes, view = mixer.module, mixer.sizes, nn.Module()
    for part in LAYOUTS[mixer.family]:
        setattr(view, part, getattr(own, part))
    view.act = getattr(own, "act", F.silu)
    view.activation = getattr(own, "activation", "silu")
    view.ssm_state_size, view.intermediate_size = sizes.state_size, sizes.intermediate_size
    view.conv_kernel_size = sizes.conv_kernel
    if mixer.family == "mamba":
        view.time_step_rank = sizes.time_step_rank
        return view
    view.num_heads, view.head_dim, view.n_groups = sizes.num_heads, sizes.head_dim, sizes.n_groups
    view.conv_dim = len(own.conv1d.weight)
    low, high = _stated(own, _LIMITS) or (0.0, float("inf"))
    view.time_step_limit = (low, high)
    if not hasattr(own.norm, "variance_epsilon"):
        view.norm = _Norm(own.norm)
    return view


@dataclass(frozen=True)
class Undo:
    """What a mixer was before it was cut."""

    cuts: tuple[Cut, ...]
    _was: tuple[tuple[Any, str, Any], ...]  # object, attribute, value

    def __call__(self) -> None:
        """Give the mixer its parameters and sizes back."""
        for holder, name, value in reversed(self._was):
            setattr(holder, name, value)


def cut_mixer(mixer: Mixer, states: Sequence[int] | None, channels: Sequence[int] | None) -> Undo:
    """Cut all states and channels but some out of a mixer that is masked already, and tell it its new sizes.

    Sizes are told by the names that the known libraries use, where the value is the old size. A configuration that
    several mixers share is copied first.

    Args:
        mixer: as `find_mixers` found it.
        states: those that stay, numbered over all groups; None: all.
        channels: those that stay; None: all.
    """
    own, before = mixer.module, mixer.sizes
    tensors = {name: p.detach().cpu() for name, p in own.named_parameters()}
    sizes, cuts = before, {}
    for way, kept in (("cut_states", states), ("cut_channels", channels)):
        if kept is not None:
            tensors, sizes, more = getattr(mixer.architecture, way)(tensors, sizes, [kept])
            cuts |= {c.name: replace(c, before=cuts[c.name].before) if c.name in cuts else c for c in more}
    was: list[tuple[Any, str, Any]] = []

    def tell(holder: Any, name: str, value: Any) -> None:
        was.append((holder, name, getattr(holder, name)))
        setattr(holder, name, value)

    for name in cuts:
        path, _, leaf = name.rpartition(".")
        holder, old = own.get_submodule(path), own.get_parameter(name)
        tell(holder, leaf, nn.Parameter(tensors[name].detach().to(old.device), requires_grad=old.requires_grad))
        for attribute, size in _module_sizes(holder):
            if getattr(holder, attribute) != size:
                tell(holder, attribute, size)
    for old, new, names in _renamed(mixer, before, sizes):
        for holder in _holders(own, tell, old, names):
            for name in names:
                if getattr(holder, name, None) == old != new:
                    tell(holder, name, new)
    return Undo(tuple(cuts.values()), tuple(was))


def _module_sizes(module: nn.Module) -> Iterator[tuple[str, int]]:
    """What a linear map or a depthwise convolution says about its weight."""
    if isinstance(module, nn.Linear):
        yield from zip(("out_features", "in_features"), module.weight.shape, strict=True)
    elif isinstance(module, nn.Conv1d):
        yield from ((name, len(module.weight)) for name in ("in_channels", "out_channels", "groups"))


def _renamed(mixer: Mixer, before: Any, after: Any) -> list[tuple[int, int, Sequence[str]]]:
    """Old size, new size, and the names it goes by."""
    changes = [(before.state_size, after.state_size, _STATES)]
    changes += [(before.intermediate_size, after.intermediate_size, _CHANNELS)]
    if mixer.family == "mamba2":
        widths = [s.intermediate_size + 2 * s.n_groups * s.state_size for s in (before, after)]
        changes += [(*widths, ("conv_dim",))]
    return changes


def _holders(own: nn.Module, tell: Callable[[Any, str, Any], None], old: int, names: Sequence[str]) -> Iterator[Any]:
    """The mixer and copies of its configurations that speak of a size."""
    yield own
    for attribute in _CONFIGURATIONS:
        configuration = getattr(own, attribute, None)
        if configuration is not None and any(getattr(configuration, name, None) == old for name in names):
            tell(own, attribute, copy.copy(configuration))
            yield getattr(own, attribute)


def tell_configurations(module: nn.Module, states: tuple[int, int], channels: tuple[int, int]) -> None:
    """Have the configurations inside a module (transformers' `config`) speak of the sizes its mixers have now.

    Args:
        module: whose mixers all had one size and all have another.
        states: before and after.
        channels: before and after.
    """
    configurations = {id(c): c for m in module.modules() if (c := getattr(m, "config", None)) is not None}
    for configuration in configurations.values():
        for (old, new), names in ((states, _STATES), (channels, _CHANNELS)):
            for name in names:
                if getattr(configuration, name, None) == old != new:
                    setattr(configuration, name, new)
