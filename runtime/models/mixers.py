"""Mamba and Mamba-2 mixers wherever they sit: found by their parameters, whatever class and model they belong to.

A family of `families` that offers `ALONE` is looked for. It sees a mixer through a view that has the names transformers
uses and the mixer's own parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ssmc.runtime.errors import CheckpointError
from ssmc.runtime.models.architectures.alone import CHANNEL_NAMES, CONFIGURATIONS, STATE_NAMES, LoneMixer
from ssmc.runtime.models.architectures.convolution import is_wrapped
from ssmc.runtime.models.architectures.dimensions import Dimensions
from ssmc.runtime.models.architectures.plan import CHANNEL, STATE, Cut
from ssmc.runtime.models.families import lone_mixers


@dataclass(frozen=True)
class Mixer:
    """A mixer inside some module."""

    name: str  # in that module
    module: nn.Module
    architecture: LoneMixer  # its family, for which the mixer is a block of its own
    sizes: Any  # as a configuration of transformers names them

    @property
    def family(self) -> str:
        """The `model_type` of its family."""
        return self.architecture.model_type

    @property
    def dimensions(self) -> Dimensions:
        """The sizes as one layer."""
        return self.architecture.dimensions(self.sizes)

    def block(self) -> nn.Module:
        """The mixer as its family wants it; its parameters are the mixer's own."""
        block = nn.Module()
        block.mixer = _view(self)
        return block


def find_mixers(module: nn.Module) -> list[Mixer]:
    """All Mamba and Mamba-2 mixers in a module, each once, in the order they are registered.

    Raises:
        CheckpointError: there is none; the message says what was looked for and what came near.
    """
    found, near, known = [], [], lone_mixers()
    for name, candidate in module.named_modules():
        missing = {family.model_type: _missing(candidate, family.parts) for family in known}
        family = next((family for family in known if not missing[family.model_type]), None)
        reason = None
        if family is not None:
            _refuse_adapters(name, candidate, family.parts)
            sizes = family.read_sizes(candidate)
            if not isinstance(sizes, str):
                found.append(Mixer(name, candidate, family, sizes))
                continue
            reason = sizes
        elif hasattr(candidate, "A_log"):
            reason = "without " + ", ".join(min(missing.values(), key=lambda names: len(list(names))))
        if reason is not None:
            near.append(f"{type(candidate).__name__} {reason}")
    if not found:
        raise CheckpointError(_nothing(module, near))
    return found


def _nothing(module: nn.Module, near: Sequence[str]) -> str:
    looked = "; ".join(f"{', '.join(family.parts)} ({family.model_type})" for family in lone_mixers())
    came = f" Not taken: {'; '.join(dict.fromkeys(near))}." if near else ""
    return (
        f"There is no Mamba or Mamba-2 mixer in this {type(module).__name__}: no part of it has {looked}, with shapes "
        f"that belong together.{came} Give a module that contains one."
    )


def _refuse_adapters(name: str, candidate: nn.Module, parts: Sequence[str]) -> None:
    """Refuse a mixer with a projection that is more than its weight.

    Raises:
        CheckpointError: naming the projection and what is around it.
    """
    for part in parts:
        module = getattr(candidate, part)
        if isinstance(module, nn.Module) and is_wrapped(module):
            kind = f"{type(module).__module__.split('.')[0]}'s {type(module).__name__}"
            raise CheckpointError(
                f"{part} of {name or 'the mixer'} is wrapped in an adapter ({kind}), whose part in it would be lost. "
                "Merge the adapter first (peft: merge_and_unload)."
            )


def _missing(candidate: nn.Module, parts: Sequence[str]) -> list[str]:
    """The parts a module lacks: parameters, or modules with a weight."""

    def there(name: str) -> bool:
        part = getattr(candidate, name, None)
        return isinstance(part if isinstance(part, torch.Tensor) else getattr(part, "weight", None), nn.Parameter)

    return [name for name in parts if not there(name)]


def _view(mixer: Mixer) -> nn.Module:
    """A module with a mixer's own parameters and the attributes that families read, by transformers' names."""
    own, sizes, view = mixer.module, mixer.sizes, nn.Module()
    for part in mixer.architecture.parts:
        setattr(view, part, getattr(own, part))
    view.act = getattr(own, "act", F.silu)
    view.activation = getattr(own, "activation", "silu")
    view.ssm_state_size, view.intermediate_size = sizes.state_size, sizes.intermediate_size
    view.conv_kernel_size = sizes.conv_kernel
    mixer.architecture.describe(view, own, sizes)
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
    for dimension, kept in ((STATE, states), (CHANNEL, channels)):
        if kept is not None:
            tensors, sizes, more = mixer.architecture.cut(tensors, sizes, dimension, [kept])
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
    changes: list[tuple[int, int, Sequence[str]]] = [(before.state_size, after.state_size, STATE_NAMES)]
    changes += [(before.intermediate_size, after.intermediate_size, CHANNEL_NAMES)]
    others = [mixer.architecture.other_sizes(sizes) for sizes in (before, after)]
    return changes + [(others[0][names], others[1][names], names) for names in others[0]]


def _holders(own: nn.Module, tell: Callable[[Any, str, Any], None], old: int, names: Sequence[str]) -> Iterator[Any]:
    """The mixer and copies of its configurations that speak of a size."""
    yield own
    for attribute in CONFIGURATIONS:
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
        for (old, new), names in ((states, STATE_NAMES), (channels, CHANNEL_NAMES)):
            for name in names:
                if getattr(configuration, name, None) == old != new:
                    setattr(configuration, name, new)
