"""Surgery from one table: what every axis of every tensor of a mixer is made of.

A row says how a tensor's axes are put together. x_proj of a Mamba-1 is (R + 2 N, D): its rows are those of dt, then
one for each state for B, then one for each state for C, and its columns are the channels:

    "x_proj.weight": ((RANK, STATE, STATE), (CHANNEL,))

All surgery follows. To cut states, keep their rows; to mask them, zero the others; to see whether they are masked, look
for something that is not zero; to widen, write back what `narrow` took. The sizes follow as well, as some axis is made
of one part alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ssmc.runtime.later import nn, torch

MODEL, CHANNEL, STATE, HEAD, RANK = "d_model", "channel", "state", "head", "dt_rank"
"""The dimensions of the mixers of this package; states are numbered over all groups. A table may have others."""

Axis = tuple[str, ...]
Selection = Mapping[str, "torch.Tensor"]
"""Dimension -> the numbers, ascending, of those that are meant."""


@dataclass(frozen=True)
class Cut:
    """One tensor that got smaller, for the list of what an export removed."""

    name: str  # "backbone.layers.0.mixer.x_proj"
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """Some entries along one axis of a tensor."""

    name: str
    axis: int
    index: torch.Tensor  # ascending


@dataclass(frozen=True)
class Plan:
    """The table of one kind of mixer, with what masking must know besides.

    Attributes:
        tensors: name -> what its axes are made of, in order. An empty axis takes no part. Tensors that a mixer lacks
            (biases are optional) count as not listed.
        silent: dimension -> the tensors that must be zero for it to be masked; the others follow or do not matter.
        constant: tensors that masking leaves as they are: they scale what is silent.
        listed_first: dimension -> the tensor that heads the list of what was cut.
    """

    tensors: Mapping[str, tuple[Axis, ...]]
    silent: Mapping[str, tuple[str, ...]]
    constant: tuple[str, ...] = ()
    listed_first: Mapping[str, str] = field(default_factory=dict)

    def sizes(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """How many there are of every dimension in a mixer whose tensors have these shapes.

        Raises:
            ValueError: the shapes do not say it, or contradict each other.
        """
        axes = [
            (parts, size)
            for name, shape in shapes.items()
            for parts, size in zip(self.tensors.get(name, ()), shape, strict=False)
            if parts
        ]
        found: dict[str, int] = {}
        for parts, size in sorted(axes, key=lambda axis: len(set(axis[0]))):
            unknown = {part for part in parts if part not in found}
            if len(unknown) == 1:
                (part,) = unknown
                found[part] = (size - sum(found.get(p, 0) for p in parts)) // parts.count(part)
        for parts, size in axes:
            if sum(found[part] for part in parts) != size:
                raise ValueError(f"an axis of {size} does not hold {' + '.join(parts)}")
        return found

    def kept(self, names: Iterable[str], sizes: Mapping[str, int], selection: Selection, dim: str) -> list[Place]:
        """Where the tensors `names` have what is selected and all that belongs to other dimensions, in their order."""
        places = self._places(names, sizes, selection, whole=True)
        first = self.listed_first.get(dim)
        return sorted(places, key=lambda place: place.name != first)

    def own(self, names: Iterable[str], sizes: Mapping[str, int], selection: Selection) -> list[Place]:
        """Where these tensors have what is selected and nothing else."""
        return list(self._places(names, sizes, selection, whole=False))

    def _places(
        self, names: Iterable[str], sizes: Mapping[str, int], selection: Selection, whole: bool
    ) -> Iterator[Place]:
        present = set(names)
        for name, axes in self.tensors.items():
            for axis, parts in enumerate(axes) if name in present else ():
                if any(part in selection for part in parts):
                    yield Place(name, axis, _index(parts, sizes, selection, whole))


def _index(parts: Axis, sizes: Mapping[str, int], selection: Selection, whole: bool) -> torch.Tensor:
    """The selected entries of an axis, with or without those of the other dimensions on it."""
    found, start = [], 0
    for part in parts:
        if part in selection:
            found.append(start + torch.as_tensor(selection[part], dtype=torch.long))
        elif whole:
            found.append(torch.arange(start, start + sizes[part]))
        start += sizes[part]
    return torch.cat(found)


def cut_tensors(tensors: dict[str, torch.Tensor], cuts: list[Cut], places: Iterable[Place], prefix: str = "") -> None:
    """Keep these entries only, in place in the dict, and list the change; names in `tensors` start with `prefix`."""
    for place in places:
        name = prefix + place.name
        before = tensors[name]
        tensors[name] = before.index_select(place.axis, place.index).contiguous()
        cuts.append(Cut(name, tuple(before.shape), tuple(tensors[name].shape)))


def silence(mixer: nn.Module, places: Iterable[Place]) -> None:
    """Zero these entries of a mixer's parameters in place."""
    for place in places:
        tensor = mixer.get_parameter(place.name).detach()
        tensor.index_fill_(place.axis, place.index.to(tensor.device), 0)


def are_silent(mixer: nn.Module, places: Iterable[Place]) -> bool:
    """Whether all these entries of a mixer's parameters are zero."""
    for place in places:
        tensor = mixer.get_parameter(place.name).detach()
        if bool(tensor.index_select(place.axis, place.index.to(tensor.device)).any()):
            return False
    return True


def take(mixer: nn.Module, places: Iterable[Place]) -> None:
    """Replace a mixer's parameters by these entries of them, without gradients."""
    for place in places:
        parent, _, leaf = place.name.rpartition(".")
        whole = mixer.get_parameter(place.name).detach()
        part = whole.index_select(place.axis, place.index.to(whole.device))
        setattr(mixer.get_submodule(parent), leaf, nn.Parameter(part, requires_grad=False))


def put_back(mixer: nn.Module, narrow: Mapping[str, torch.Tensor], places: Iterable[Place]) -> None:
    """The opposite of `take`: write the tensors of a narrow mixer to their places in a whole one."""
    for place in places:
        tensor = mixer.get_parameter(place.name).detach()
        tensor.index_copy_(place.axis, place.index.to(tensor.device), narrow[place.name])
