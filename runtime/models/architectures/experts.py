"""Mixtures of experts: whole experts that go, and neurons of every expert, as `units` has them for other modules.

transformers holds the weights of all experts of a layer as one tensor, experts first. The router of a layer chooses
some of them for each token by a score, without a threshold: among those that are left it chooses anew, and what it
weighs them by follows. So an expert cannot be silent in a model of the whole shape: `Experts` are cut out at once,
neurons of experts are silent like others.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ssmc.runtime.later import nn, torch
from ssmc.runtime.models.architectures.plan import MODEL, Cut, Plan, Selection, cut_tensors
from ssmc.runtime.models.architectures.units import NEURON, Part

EXPERT, EXPERT_WIDTH = "expert", "expert-width"
"""Kinds of units, named as the patterns that remove them."""

MEMBER, LATENT = "member", "latent"
"""Dimensions of the tables: experts of a layer; what experts read where that is not the residual stream."""


def experts_plan(
    maps: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]], router: str, before: str = "", behind: str = ""
) -> Plan:
    """The table of a mixture of experts: that of one of them, `maps`, stacked, a router, and maps around the latent."""
    stacked: dict[str, tuple[tuple[str, ...], ...]]
    stacked = {f"experts.{name}": ((MEMBER,), *axes) for name, axes in maps.items()}
    chosen = {f"{router}.weight": ((MEMBER,), (MODEL,)), f"{router}.e_score_correction_bias": ((MEMBER,),)}
    if before and behind:
        chosen |= {f"{before}.weight": ((LATENT,), (MODEL,)), f"{before}.bias": ((LATENT,),)}
        chosen |= {f"{behind}.weight": ((MODEL,), (LATENT,)), f"{behind}.bias": ((MODEL,),)}
    return Plan(tensors=stacked | chosen, silent={MEMBER: (), NEURON: ("experts.down_proj",)})


GATED_MAPS = {"gate_up_proj": ((NEURON, NEURON), (MODEL,)), "down_proj": ((MODEL,), (NEURON,))}
"""An expert with a gate, gate and value joined, in that order."""

PLAIN_MAPS = {"up_proj": ((NEURON,), (LATENT,)), "down_proj": ((LATENT,), (NEURON,))}
"""An expert without one."""


@dataclass(frozen=True, kw_only=True)
class Mixture(Part):
    """A mixture of experts inside a block.

    Attributes:
        router: the module in it that chooses; its forward gives (logits, weights (T, k), experts (T, k)).
        members: field of the configuration: how many experts there are.
        before, behind: linear maps between the residual stream and the experts; empty, or not there: none.
    """

    kind: str = EXPERT
    reader: str = "experts"
    router: str = "router"
    members: str = "num_local_experts"
    before: str = ""
    behind: str = ""

    def reading(self, module: nn.Module) -> list[str]:
        """The router, and the experts' first map or the map before it."""
        before = getattr(module, self.before, None) if self.before else None
        if isinstance(before, nn.Linear):
            return [f"{self.router}.weight", f"{self.before}.weight"]
        return [f"{self.router}.weight", f"experts.{first_map(module.experts)}"]

    def how_many(self, config: Any) -> int:
        """Experts of a layer; 0 where a layer has none."""
        return (getattr(config, self.members, None) or 0) if self.there(config) else 0

    def put_out(self, module: nn.Module, hidden: torch.Tensor, expert: int) -> torch.Tensor:
        """What one expert adds to the residual stream for tokens (T, d_model), before the router weighs it."""
        before, behind = getattr(module, self.before or "-", None), getattr(module, self.behind or "-", None)
        x = hidden if before is None else before(hidden)
        out = neurons_of(module.experts, x, expert) @ module.experts.down_proj[expert].t()
        # without the bias of `behind`, which does not depend on the expert
        return out @ behind.weight.t() if isinstance(behind, nn.Linear) else out


@dataclass(frozen=True, kw_only=True)
class Experts(Mixture):
    """Experts that go as a whole, and at once: see the head of this file.

    Attributes:
        groups_field: field of the configuration: groups of experts of which the router takes some first; empty: none.
        groups_taken: field of the configuration: how many of these it takes.
        least: that a stock model can have.
    """

    size: str = "num_local_experts"
    groups_field: str = ""
    groups_taken: str = ""
    least: int = 1

    unit = MEMBER

    def total(self, config: Any) -> int:
        """How many experts a layer has."""
        return self.how_many(config)

    def allowed(self, config: Any) -> list[int]:
        """As many of every group, and no fewer than a token is sent to."""
        groups, taken = getattr(config, self.groups_field or "-", 1), getattr(config, self.groups_taken or "-", 1)
        least = max(self.least, config.num_experts_per_tok)
        # a group is judged by its two best experts
        each = range(2 if self.groups_field else 1, self.total(config) // groups + 1)
        return [n * groups for n in each if least <= n * taken and n * groups < self.total(config)]

    def groups(self, module: nn.Module) -> int:
        """Those of which the router takes some first."""
        return getattr(getattr(module, self.router), "num_group", 1)

    def selection(self, kept: Sequence[int], sizes: Mapping[str, int], owner: Any) -> Selection:
        """The experts."""
        return {MEMBER: torch.as_tensor(list(kept), dtype=torch.long)}

    def remove(self, module: nn.Module, kept: Sequence[int]) -> None:
        """Take all experts of a module but `kept` away, in place: the others get new numbers."""
        keep_experts(getattr(module, self.router), kept)
        keep_experts(module.experts, kept)
        if hasattr(module, "num_experts"):
            module.num_experts = len(kept)


@dataclass(frozen=True, kw_only=True)
class ExpertNeurons(Mixture):
    """Neurons of experts, as many of each; they are numbered over all experts of a layer, one after the other."""

    kind: str = EXPERT_WIDTH

    def total(self, config: Any) -> int:
        """How many neurons an expert has; 0 where there are no experts."""
        return getattr(config, self.size) if self.how_many(config) else 0

    def allowed(self, config: Any) -> list[int]:
        """Those that the product of all experts at once takes, see `whole_strides`."""
        return whole_strides(self.total(config))

    def numbers(self, module: nn.Module, config: Any) -> range:
        """Those of all experts."""
        return range(len(module.experts.down_proj) * self.total(config))

    def some(self, config: Any, count: int) -> list[int]:
        """The first of every expert."""
        width = self.total(config)
        return [expert * width + n for expert in range(self.how_many(config)) for n in range(count)]

    def resize(self, config: Any, kept: Sequence[int]) -> None:
        """One width for all."""
        setattr(config, self.size, len(kept) // self.how_many(config))

    def mask(self, module: nn.Module, kept: Sequence[int]) -> None:
        """Silence all neurons but `kept`, in place."""
        for name, axis, goes in self._silent(module, kept):
            module.get_parameter(name).detach().masked_fill_(_along(goes, axis), 0)

    def is_masked(self, module: nn.Module, kept: Sequence[int]) -> bool:
        """Whether nothing is read from the others."""
        found = [p for p in self._silent(module, kept) if p[0] in self.plan.silent[NEURON]]
        return not any(bool((module.get_parameter(n).detach() * _along(goes, axis)).any()) for n, axis, goes in found)

    def cut_module(
        self, tensors: dict[str, torch.Tensor], cuts: list[Cut], prefix: str, kept: Sequence[int], config: Any
    ) -> None:
        """Every expert loses neurons of its own."""
        names = [name for name in self.plan.tensors if prefix + name in tensors and NEURON in _parts(self.plan, name)]
        experts = len(tensors[prefix + names[0]])
        width = self._width({name: tensors[prefix + name].shape for name in names})
        smaller: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        for expert in range(experts):
            own = torch.as_tensor([n - expert * width for n in kept if n // width == expert], dtype=torch.long)
            single = {name: tensors[prefix + name][expert] for name in names}
            sliced = Plan({name: self.plan.tensors[name][1:] for name in names}, {})
            sizes = sliced.sizes({name: tensor.shape for name, tensor in single.items()})
            cut_tensors(single, [], sliced.kept(names, sizes, {NEURON: own}, NEURON))
            for name in names:
                smaller[name].append(single[name])
        for name in names:
            before, tensors[prefix + name] = tensors[prefix + name], torch.stack(smaller[name])
            cuts.append(Cut(prefix + name, tuple(before.shape), tuple(tensors[prefix + name].shape)))

    def _width(self, shapes: Mapping[str, Sequence[int]]) -> int:
        return self.plan.sizes(shapes)[NEURON]

    def _silent(self, module: nn.Module, kept: Sequence[int]) -> Iterator[tuple[str, int, torch.Tensor]]:
        """Tensors, the axis of their neurons, and which entries of it go, (E, entries)."""
        named = {n: p for n, p in module.named_parameters() if NEURON in _parts(self.plan, n)}
        width = self._width({name: parameter.shape for name, parameter in named.items()})
        goes = torch.ones(len(module.experts.down_proj) * width, dtype=torch.bool)
        goes[torch.as_tensor(list(kept), dtype=torch.long)] = False
        for name, parameter in named.items():
            axis = next(i for i, parts in enumerate(self.plan.tensors[name]) if NEURON in parts)
            times = len(self.plan.tensors[name][axis])
            yield name, axis, goes.view(-1, width).repeat(1, times).to(parameter.device)


def whole_strides(width: int) -> list[int]:
    """The widths of experts below one that stock models can run; as much is true of what they read, d_model.

    transformers runs all experts in one call of torch's grouped product, whose rows are whole multiples of 16 bytes: 8
    numbers of half precision, or 4 where the dense width has no more.
    """
    step = next(n for n in (8, 4, 1) if width % n == 0)
    return list(range(step, width, step))


def neurons_of(experts: nn.Module, x: torch.Tensor, expert: int) -> torch.Tensor:
    """What the last map of an expert reads, (T, neurons), where the first reads x (T, in)."""
    first = x @ getattr(experts, first_map(experts))[expert].t()
    if first_map(experts) == "up_proj":
        return experts.act_fn(first)
    gate, up = first.chunk(2, dim=-1)
    return experts.act_fn(gate) * up


def first_map(experts: nn.Module) -> str:
    """What the first map of experts is called: gate and value in one, or the value alone."""
    return "gate_up_proj" if hasattr(experts, "gate_up_proj") else "up_proj"


def with_experts(module: nn.Module, kept: Sequence[int]) -> nn.Module:
    """A copy of a router, or of the experts, that knows some experts only."""
    return keep_experts(copy.deepcopy(module), kept)


def keep_experts(module: nn.Module, kept: Sequence[int]) -> nn.Module:
    """Leave a router, or experts, some of them only, in place; all of its tensors have experts first."""
    index = torch.as_tensor(list(kept), dtype=torch.long)
    for name, parameter in list(module.named_parameters(recurse=False)):
        part = parameter.detach()[index.to(parameter.device)]
        setattr(module, name, nn.Parameter(part, requires_grad=parameter.requires_grad))
    for name, buffer in list(module.named_buffers(recurse=False)):
        setattr(module, name, buffer[index.to(buffer.device)])
    module.num_experts = len(index)
    return module


def _along(entries: torch.Tensor, axis: int) -> torch.Tensor:
    """(E, entries) as it goes with a tensor of three axes whose `axis` has the entries."""
    return entries.unsqueeze(3 - axis)


def _parts(plan: Plan, name: str) -> set[str]:
    return {part for parts in plan.tensors.get(name, ()) for part in parts}
