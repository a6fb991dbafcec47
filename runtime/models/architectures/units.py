"""What blocks have many of beside their mixer: neurons of an MLP, query heads of attention, and how some of them go.

What a unit computes reaches the residual stream through one linear map. So a unit goes without a trace where its rows
of the maps before it and its columns of that one go, and that one can be refitted to make up for it. A family lists
its modules as `Part`s, each with a table as `plan` has them for mixers; masking, cutting and counting follow.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from ssmc.runtime.later import nn, torch
from ssmc.runtime.models.architectures.capabilities import Otherwise
from ssmc.runtime.models.architectures.plan import (
    MODEL,
    Cut,
    Place,
    Plan,
    Selection,
    are_silent,
    cut_tensors,
    silence,
)

MLP, ATTENTION = "mlp", "attention"
"""Kinds of units, named as the patterns that remove them."""

NEURON, QUERY, KV = "neuron", "query", "key and value"
"""Dimensions of the tables: the last two count channels, of which a head has several."""

GATED = Plan(
    tensors={
        "gate_proj.weight": ((NEURON,), (MODEL,)),
        "gate_proj.bias": ((NEURON,),),
        "up_proj.weight": ((NEURON,), (MODEL,)),
        "up_proj.bias": ((NEURON,),),
        "down_proj.weight": ((MODEL,), (NEURON,)),
        "down_proj.bias": ((MODEL,),),
    },
    silent={NEURON: ("down_proj.weight",)},
)
"""An MLP, with a gate or without."""

FUSED = Plan(
    tensors={
        "input_linear.weight": ((NEURON, NEURON), (MODEL,)),  # gate, then up
        "output_linear.weight": ((MODEL,), (NEURON,)),
    },
    silent={NEURON: ("output_linear.weight",)},
)
"""An MLP whose gate and whose other map are one."""

HEADS = Plan(
    tensors={
        "q_proj.weight": ((QUERY,), (MODEL,)),
        "q_proj.bias": ((QUERY,),),
        "k_proj.weight": ((KV,), (MODEL,)),
        "k_proj.bias": ((KV,),),
        "v_proj.weight": ((KV,), (MODEL,)),
        "v_proj.bias": ((KV,),),
        "o_proj.weight": ((MODEL,), (QUERY,)),
        "o_proj.bias": ((MODEL,),),
    },
    silent={QUERY: ("o_proj.weight",), KV: ()},
)
"""Attention. Keys and values of a group go when all of its queries do."""


@dataclass(frozen=True)
class Writer:
    """A linear map through which what a part of a block computed goes into the residual stream.

    Attributes:
        name: within a block.
        stage: maps of one stage add to the same stream; those of the next read what that one put out.
        scale: attribute of a block that what the map puts out is multiplied by; empty: nothing is.
    """

    name: str
    stage: int = 0
    scale: str = ""

    def scale_in(self, block: nn.Module) -> float:
        """The factor."""
        return float(attrgetter(self.scale)(block)) if self.scale else 1.0


@dataclass(frozen=True)
class Part:
    """A module that some blocks have, whose units can go one by one; as it stands for the neurons of an MLP.

    Attributes:
        kind: of its units, named as the pattern that removes them.
        name: of the module within a block.
        plan: what the axes of its tensors are made of.
        reader: the map in it that reads the units.
        size: field of the configuration: how many units there are.
        of_layers: what its list of kinds of layers, where it has one, calls those with such a module; empty: any.
    """

    kind: str
    name: str
    plan: Plan
    reader: str
    size: str
    of_layers: str = field(default="", kw_only=True)

    unit = NEURON

    def inside(self, block: nn.Module) -> nn.Module | None:
        """The module in a block; None where it has none."""
        module = find_module(block, f"{self.name}.{self.reader}")
        return None if module is None else find_module(block, self.name)

    def there(self, config: Any) -> bool:
        """Whether any layer of a model has such a module, as far as its list of kinds says."""
        return not self.of_layers or self.of_layers in config.layers_block_type

    def total(self, config: Any) -> int:
        """How many units the modules of a model have; 0 without any."""
        return getattr(config, self.size) if self.there(config) else 0

    def refusal(self, config: Any) -> str | None:
        """Why units of this model cannot go; None where they can."""
        return None

    def allowed(self, config: Any) -> list[int]:
        """How many of them may stay, rising, below the total."""
        return list(range(1, self.total(config)))

    def channels(self, owner: Any) -> int:
        """Columns of the reader that a unit has; `owner` is the module or the configuration."""
        return 1

    def groups(self, module: nn.Module) -> int:
        """Groups of units of which as many stay in each."""
        return 1

    def selection(self, kept: Sequence[int], sizes: Mapping[str, int], owner: Any) -> Selection:
        """What stays of every dimension of the table where these units do."""
        return {NEURON: torch.as_tensor(list(kept), dtype=torch.long)}

    def some(self, config: Any, count: int) -> list[int]:
        """So many units that can stay together; `count` is one of `allowed`."""
        return list(range(count))

    def numbers(self, module: nn.Module, config: Any) -> range:
        """The numbers that the units of a module have."""
        return range(self.total(config))

    def resize(self, config: Any, kept: Sequence[int]) -> None:
        """Tell a configuration, in place, that these units stay."""
        setattr(config, self.size, len(kept))

    def reading(self, module: nn.Module) -> list[str]:
        """The weights of a module that read the residual stream, by name within it."""
        return [name for name, axes in self.plan.tensors.items() if axes[1:] == ((MODEL,),)]

    def mask(self, module: nn.Module, kept: Sequence[int]) -> None:
        """Silence all units of a module but `kept`, in place; shapes stay."""
        silence(module, self._others(module, kept))

    def is_masked(self, module: nn.Module, kept: Sequence[int]) -> bool:
        """Whether all units outside `kept` are silent, so that cutting them changes nothing."""
        return are_silent(module, [p for p in self._others(module, kept) if p.name in self.plan.silent[self.unit]])

    def cut(
        self, tensors: Mapping[str, torch.Tensor], config: Any, kept: Mapping[str, Sequence[int]]
    ) -> tuple[dict[str, torch.Tensor], Any, list[Cut]]:
        """Remove all units but those kept from a whole state dict and its configuration.

        Args:
            tensors: by the model's names.
            config: transformers' configuration.
            kept: start of the names of a block's tensors -> the units that stay there, as many in each block. All
                blocks with such a module are named.
        """
        out, cuts, smaller = dict(tensors), [], copy.deepcopy(config)
        for block, units in kept.items():
            self.cut_module(out, cuts, f"{block}{self.name}.", units, config)
        self.resize(smaller, next(iter(kept.values())))
        return out, smaller, cuts

    def cut_module(
        self, tensors: dict[str, torch.Tensor], cuts: list[Cut], prefix: str, kept: Sequence[int], config: Any
    ) -> None:
        """As `cut`, of one module, whose tensors' names start with `prefix`: in place, the changes added to `cuts`."""
        shapes = {name: tensors[prefix + name].shape for name in self.plan.tensors if prefix + name in tensors}
        sizes = self.plan.sizes(shapes)
        selection = self.selection(kept, sizes, config)
        cut_tensors(tensors, cuts, self.plan.kept(shapes, sizes, selection, self.unit), prefix)

    def _others(self, module: nn.Module, kept: Sequence[int]) -> list[Place]:
        """Where a module has what goes when `kept` stay."""
        shapes = {name: tensor.shape for name, tensor in module.named_parameters() if name in self.plan.tensors}
        sizes = self.plan.sizes(shapes)
        stays = self.selection(kept, sizes, module)
        goes = {d: _without(index, sizes[d]) for d, index in stays.items()}
        return self.plan.own(shapes, sizes, goes)


@dataclass(frozen=True)
class Attention(Part):
    """Attention, with query heads in groups that share keys and values: some of each group go, or whole groups."""

    kind: str = ATTENTION
    name: str = "self_attn"
    plan: Plan = HEADS
    reader: str = "o_proj"
    size: str = "num_attention_heads"

    unit = QUERY

    def allowed(self, config: Any) -> list[int]:
        """As many of every group that stays."""
        total, groups = self.total(config), config.num_key_value_heads
        pairs = {stay * each for stay in range(1, groups + 1) for each in range(1, total // groups + 1)}
        return sorted(pairs - {total})

    def channels(self, owner: Any) -> int:
        """The channels of a head."""
        return head_dim_of(owner)

    def groups(self, module: nn.Module) -> int:
        """Those that share keys and values."""
        return len(module.k_proj.weight) // head_dim_of(module)

    def selection(self, kept: Sequence[int], sizes: Mapping[str, int], owner: Any) -> Selection:
        """Channels of the query heads, and of the keys and values that any of them reads."""
        width = head_dim_of(owner)
        each = sizes[QUERY] // sizes[KV]
        return {QUERY: _channels(kept, width), KV: _channels(sorted({head // each for head in kept}), width)}

    def some(self, config: Any, count: int) -> list[int]:
        """As many of every group, of as many groups as can be."""
        groups = config.num_key_value_heads
        each = self.total(config) // groups
        stay = next(n for n in range(groups, 0, -1) if count % n == 0 and count // n <= each)
        return [group * each + head for group in range(stay) for head in range(count // stay)]

    def resize(self, config: Any, kept: Sequence[int]) -> None:
        """The numbers of heads, and what a head has, which is a fixed number from now on."""
        each = config.num_attention_heads // config.num_key_value_heads
        config.head_dim = head_dim_of(config)
        config.num_key_value_heads = len({head // each for head in kept})
        config.num_attention_heads = len(kept)


def attends_in_4(config: Any) -> tuple[Otherwise, ...]:
    """That transformers 4.57 loads no attention but one as wide as d_model, of families where it reads no head_dim."""
    if config.num_attention_heads * head_dim_of(config) == config.hidden_size:
        return ()
    what = "its release 4.57 takes attention only as wide as d_model, here query heads are gone; release 5 takes any"
    return (Otherwise("transformers", what, release="4.57", refused=True),)


def head_dim_of(owner: Any) -> int:
    """Channels of an attention head, by a module or a configuration."""
    return getattr(owner, "head_dim", None) or owner.hidden_size // owner.num_attention_heads


def find_module(block: nn.Module, name: str) -> nn.Module | None:
    """A module inside a block by its name; None where there is none, or where it is empty."""
    for step in name.split(".") if name else ():
        block = getattr(block, step, None)
        if not isinstance(block, nn.Module):
            return None
    return block


def _without(index: torch.Tensor, total: int) -> torch.Tensor:
    left = torch.ones(total, dtype=torch.bool)
    left[index] = False
    return left.nonzero()[:, 0]


def _channels(heads: Sequence[int], width: int) -> torch.Tensor:
    numbers = [head * width + channel for head in heads for channel in range(width)]
    return torch.as_tensor(numbers, dtype=torch.long)
