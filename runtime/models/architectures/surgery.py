"""Mask, cut, narrow and widen along any dimension of a family's table; families add what else has to change."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from ssmc.runtime.later import nn, torch
from ssmc.runtime.models.architectures.plan import (
    Cut,
    Plan,
    Selection,
    are_silent,
    cut_tensors,
    put_back,
    silence,
    take,
)

Sizes = Mapping[str, int]
"""Dimension -> how many a mixer has."""


class PlannedSurgery:
    """Surgery on mixers and state dicts that follows from `plan`; see `interface.Surgery` for the promises."""

    plan: Plan
    rates_name = "A_log"  # a tensor that every mixer has: where it is missing there is none

    def selection(self, dimension: str, numbers: Sequence[int], sizes: Sizes) -> Selection:
        """These numbers of a dimension, with those of other dimensions that go with them."""
        return {dimension: torch.as_tensor(list(numbers), dtype=torch.long)}

    def dropped(self, dimension: str, kept: Sequence[int], sizes: Sizes) -> Selection:
        """What goes where only `kept` of a dimension stay, in this and in other dimensions."""
        return self.selection(dimension, _others(sizes[dimension], kept), sizes)

    def with_kept(self, config: Any, dimension: str, kept: Sequence[int]) -> Any:
        """A configuration whose mixers have what was kept, and all else the same."""
        return self.with_size(config, dimension, len(kept))

    def with_size(self, config: Any, dimension: str, count: int) -> Any:
        """A configuration whose mixers have `count` of a dimension, and all else the same."""
        raise NotImplementedError

    def mask(self, mixer: nn.Module, dimension: str, kept: Sequence[int]) -> None:
        """Silence all of a dimension but `kept`, in place; shapes stay."""
        names, sizes = _names_and_sizes(self.plan, mixer)
        dropped = self.dropped(dimension, kept, sizes)
        places = self.plan.own(names, sizes, dropped)
        silence(mixer, [place for place in places if place.name not in self.plan.constant])

    def is_masked(self, mixer: nn.Module, dimension: str, kept: Sequence[int]) -> bool:
        """Whether everything outside `kept` is silent, so that cutting it changes nothing."""
        names, sizes = _names_and_sizes(self.plan, mixer)
        dropped = self.dropped(dimension, kept, sizes)
        deciding = [name for name in names if name in self.plan.silent[dimension]]
        return are_silent(mixer, self.plan.own(deciding, sizes, dropped))

    def cut(
        self, tensors: Mapping[str, torch.Tensor], config: Any, dimension: str, kept: Sequence[Sequence[int]]
    ) -> tuple[dict[str, torch.Tensor], Any, list[Cut]]:
        """Remove all of a dimension but `kept[layer]` from a whole state dict and its configuration.

        Stock loaders have one size for all layers: the configuration says the largest number, and only if all layers
        keep as many can they load the result.
        """
        out, cuts, most = dict(tensors), [], max(map(len, kept))
        longest: Sequence[int] = max(kept, key=len)
        for layer, numbers in enumerate(kept):
            prefix = self.mixer_prefix(layer)
            if prefix + self.rates_name not in tensors:  # a layer of another kind
                continue
            shapes = {name: tensors[prefix + name].shape for name in self.plan.tensors if prefix + name in tensors}
            sizes = self.plan.sizes(shapes)
            selection = self.selection(dimension, numbers, sizes)
            cut_tensors(out, cuts, self.plan.kept(shapes, sizes, selection, dimension), prefix)
            self.after_cut(out, prefix, dimension, sizes, (len(numbers), most))
            longest = numbers if len(numbers) == most else longest
        return out, self.with_kept(config, dimension, longest), cuts

    def narrow(self, block: nn.Module, dimension: str, kept: Sequence[int]) -> nn.Module:
        """A copy of a block with some of a dimension only: what the block computes when the others are silent."""
        narrow = copy.deepcopy(block)
        mixer = self.mixer(narrow)
        names, sizes = _names_and_sizes(self.plan, mixer)
        take(mixer, self.plan.kept(names, sizes, self.selection(dimension, kept, sizes), dimension))
        self.after_narrow(mixer, dimension, sizes, len(kept))
        return narrow

    def widen(self, block: nn.Module, narrow: nn.Module, dimension: str, kept: Sequence[int]) -> None:
        """Write the weights of a block made by `narrow` back to their places in `block`, and silence the rest."""
        mixer = self.mixer(block)
        names, sizes = _names_and_sizes(self.plan, mixer)
        parameters = {name: tensor.detach() for name, tensor in self.mixer(narrow).named_parameters()}
        tensors = self.before_widen(parameters, dimension, sizes, len(kept))
        places = self.plan.kept(names, sizes, self.selection(dimension, kept, sizes), dimension)
        put_back(mixer, tensors, places)
        for name in set(names) - {place.name for place in places}:  # no axis of theirs was narrowed: x_proj.bias
            mixer.get_parameter(name).detach().copy_(tensors[name])
        self.mask(mixer, dimension, kept)

    def after_cut(
        self, tensors: dict[str, torch.Tensor], prefix: str, dimension: str, sizes: Sizes, left: tuple[int, int]
    ) -> None:
        """Make up, in place, for what cutting a mixer changes.

        Args:
            tensors: the whole state dict.
            prefix: of the mixer's tensors in it.
            dimension: along which it was cut.
            sizes: of the mixer before.
            left: how many of the dimension it keeps, and how many the layer that keeps most.
        """

    def after_narrow(self, mixer: nn.Module, dimension: str, sizes: Sizes, left: int) -> None:
        """Tell a narrow mixer its sizes, and make up for what narrowing changes; `sizes` are those before."""

    def before_widen(
        self, tensors: Mapping[str, torch.Tensor], dimension: str, sizes: Sizes, left: int
    ) -> Mapping[str, torch.Tensor]:
        """The parameters of a narrow mixer as the whole one wants them: what `after_narrow` did is undone."""
        return tensors

    def with_epsilons_of(self, model: nn.Module, config: Any) -> None:
        """Give a mixer's norms the epsilon they have, in effect, where silent ones are cut out: none here."""


def _names_and_sizes(plan: Plan, mixer: nn.Module) -> tuple[list[str], dict[str, int]]:
    shapes = {name: tensor.shape for name, tensor in mixer.named_parameters() if name in plan.tensors}
    return list(shapes), plan.sizes(shapes)


def _others(total: int, kept: Sequence[int]) -> list[int]:
    return sorted(set(range(total)) - set(kept))
