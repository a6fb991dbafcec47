"""Mamba and Mamba-2 mixers wherever they sit: found by their parameters, whatever class and model they belong to.

A family of `families` that offers `ALONE` is looked for. It sees a mixer through a view that has the names transformers
uses and the mixer's own parameters.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ssmc.runtime.errors import CheckpointError
from ssmc.runtime.models.architectures.alone import CHANNEL_NAMES, CONFIGURATIONS, STATE_NAMES, LoneMixer
from ssmc.runtime.models.architectures.convolution import is_wrapped
from ssmc.runtime.models.architectures.dimensions import Dimensions
from ssmc.runtime.models.architectures.plan import CHANNEL, STATE, Cut
from ssmc.runtime.models.families import lone_mixers

OTHER_LAYOUTS = {
    "A_logs": "scans of several directions with their parameters stacked in one tensor, as SS2D of VMamba has them, "
    "but without all that stands beside them there, or in other shapes",
    "A_log_fwd": "two directions with parameters of their own in one module; give each direction a mixer of its own",
}
"""Parameters by which mixers are known whose layout is not read -> what they are."""


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


def find_mixers(module: nn.Module, beside: int = 0) -> list[Mixer]:
    """All Mamba and Mamba-2 mixers in a module, each once, in the order they are registered.

    Args:
        module: that may hold some.
        beside: how many mixers of other kinds were found in it.

    Raises:
        CheckpointError: there is none at all; the message says what was looked for and what came near.
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
            reason = _lacks(candidate, min(missing.values(), key=lambda names: len(list(names))))
        elif (other := next((name for name in OTHER_LAYOUTS if hasattr(candidate, name)), None)) is not None:
            reason = f"with {other}: {OTHER_LAYOUTS[other]}"
        if reason is not None:
            near.append(f"{type(candidate).__name__} {reason}")
    if not found and not beside:
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


def _lacks(candidate: nn.Module, parts: Sequence[str]) -> str:
    """What keeps a module from being a mixer: parts that it has not, or that have no weight of their own."""
    absent = [name for name in parts if getattr(candidate, name, None) is None]
    said = [f"without {', '.join(absent)}"] if absent else []
    for name in parts:
        part, kind = getattr(candidate, name, None), type(getattr(candidate, name, None)).__name__
        weight = getattr(part, "weight", None)
        if isinstance(part, nn.Module) and is_parametrized(part):
            said.append(f"whose {name} is parametrised (torch.nn.utils.parametrize.remove_parametrizations ends that)")
        elif isinstance(weight, torch.Tensor):
            said.append(f"whose {name} ({kind}) holds {str(weight.dtype).removeprefix('torch.')}, not a parameter")
        elif isinstance(part, nn.Module):
            said.append(f"whose {name} ({kind}) has no weight of its own")
    return " and ".join(said)


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
    was: tuple[tuple[Any, str, Any], ...]  # object, attribute, value

    def __call__(self) -> None:
        """Give the mixer its parameters and sizes back."""
        for holder, name, value in reversed(self.was):
            setattr(holder, name, value)


def cut_mixer(mixer: Mixer, states: Sequence[int] | None, channels: Sequence[int] | None) -> Undo:
    """Cut all states and channels but some out of a mixer that is masked already, and tell it its new sizes.

    Sizes are told by the names that the known libraries use, where the value is the old size. A configuration that
    several mixers share is copied first.

    Args:
        mixer: as `find_mixers` found it.
        states: those that stay, numbered over all groups; None: all.
        channels: those that stay; None: all.

    Raises:
        AttributeError, TypeError: the mixer does not let a size be set; it is as it was.
    """
    own, before = mixer.module, mixer.sizes
    tensors = {name: p.detach().cpu() for name, p in own.named_parameters()}
    sizes, cuts = before, {}
    for dimension, kept in ((STATE, states), (CHANNEL, channels)):
        if kept is not None:
            tensors, sizes, more = mixer.architecture.cut(tensors, sizes, dimension, [kept])
            cuts |= {c.name: replace(c, before=cuts[c.name].before) if c.name in cuts else c for c in more}
    with taken_back_on_failure() as was:
        for name in cuts:
            tell_tensor(was, own, name, tensors[name])
        for old, new, names in _renamed(mixer, before, sizes):
            if old != new:
                tell_sizes(was, own, old, new, names)
                for attribute in CONFIGURATIONS:
                    tell_configuration(was, own, attribute, dict.fromkeys(names, new), old)
    return Undo(tuple(cuts.values()), tuple(was))


@contextlib.contextmanager
def taken_back_on_failure() -> Iterator[list[tuple[Any, str, Any]]]:
    """The list in which `tell` and its kind note what was; all of it is given back if something raises meanwhile."""
    was: list[tuple[Any, str, Any]] = []
    try:
        yield was
    except BaseException:
        Undo((), tuple(was))()
        raise


def in_place_of(old: nn.Parameter, tensor: torch.Tensor) -> nn.Parameter:
    """A parameter in the place of a larger one, with its attributes, such as `_no_weight_decay`."""
    new = nn.Parameter(tensor.detach().to(old.device), requires_grad=old.requires_grad)
    vars(new).update(vars(old))
    return new


def tell(was: list[tuple[Any, str, Any]], holder: Any, name: str, value: Any) -> None:
    """Set an attribute and note what it was."""
    before = getattr(holder, name)
    setattr(holder, name, value)
    was.append((holder, name, before))


def tell_tensor(was: list[tuple[Any, str, Any]], own: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put a smaller tensor in the place of a parameter, and tell the module that holds it the sizes it has now."""
    path, _, leaf = name.rpartition(".")
    holder = own.get_submodule(path)
    tell(was, holder, leaf, in_place_of(own.get_parameter(name), tensor))
    for attribute, size in _module_sizes(holder):
        if getattr(holder, attribute) != size:
            tell(was, holder, attribute, size)


def tell_tensors(
    was: list[tuple[Any, str, Any]], own: nn.Module, smaller: Mapping[str, torch.Tensor]
) -> tuple[Cut, ...]:
    """Put smaller tensors in the places of parameters, by name, and say what was cut."""
    cuts = []
    for name, tensor in smaller.items():
        cuts.append(Cut(name, tuple(own.get_parameter(name).shape), tuple(tensor.shape)))
        tell_tensor(was, own, name, tensor.contiguous())
    return tuple(cuts)


def tell_sizes(was: list[tuple[Any, str, Any]], own: nn.Module, old: int, new: int, names: Sequence[str]) -> None:
    """Tell a mixer a size by each name that has the old one; a read-only property says what it says."""
    for name in names:
        if getattr(own, name, None) == old and not isinstance(getattr(type(own), name, None), property):
            tell(was, own, name, new)


def tell_configuration(
    was: list[tuple[Any, str, Any]], holder: Any, attribute: str, sizes: Mapping[str, int], old: int
) -> None:
    """Give a holder another configuration in which all of these names that had the old size have the new one.

    The configuration itself stays as it is, as others may read it too.
    """
    configuration = getattr(holder, attribute, None)
    changed = {name: size for name, size in sizes.items() if getattr(configuration, name, None) == old}
    if configuration is None or not changed:
        return
    with contextlib.suppress(AttributeError, TypeError, ValueError):  # one that cannot be told keeps what it says
        tell(was, holder, attribute, _with_sizes(configuration, changed))


def _with_sizes(configuration: Any, sizes: Mapping[str, int]) -> Any:
    """A copy of a configuration with other sizes; named tuples and dataclasses are made anew.

    A class of another kind that lets nobody set an attribute (pydantic's frozen models, say) is asked past its own
    `__setattr__`: the copy is nobody else's yet.
    """
    if hasattr(configuration, "_replace"):
        return configuration._replace(**sizes)
    if is_dataclass(configuration) and not isinstance(configuration, type):
        return replace(configuration, **sizes)
    changed = copy.copy(configuration)
    for name, size in sizes.items():
        try:
            setattr(changed, name, size)
        except Exception:  # each library has its own error for this
            object.__setattr__(changed, name, size)
    return changed


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


def tell_configurations(module: nn.Module, states: tuple[int, int], channels: tuple[int, int]) -> Undo:
    """Have the configurations inside a module (transformers' `config`) speak of the sizes its mixers have now.

    One that several parts share is still shared afterwards; those that cannot be changed keep what they say.

    Args:
        module: whose mixers all had one size and all have another.
        states: before and after.
        channels: before and after.
    """
    was: list[tuple[Any, str, Any]] = []
    made: dict[int, Any] = {}  # by the configuration before
    for part in module.modules():
        configuration = getattr(part, "config", None)
        sizes = {
            name: new
            for (old, new), names in ((states, STATE_NAMES), (channels, CHANNEL_NAMES))
            for name in names
            if old != new and getattr(configuration, name, None) == old
        }
        if configuration is None or not sizes:
            continue
        try:
            for name, size in sizes.items():
                tell(was, configuration, name, size)
        except Exception:  # frozen: each library has its own error for this
            with contextlib.suppress(AttributeError, TypeError, ValueError):
                changed = made.setdefault(id(configuration), _with_sizes(configuration, sizes))
                tell(was, part, "config", changed)
    return Undo((), tuple(was))
