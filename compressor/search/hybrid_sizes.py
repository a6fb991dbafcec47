"""Smaller hybrids along all of their axes: which there are, and how many parameters they have, by counting alone."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

from ssmc.compressor.families import axes_of_hybrid
from ssmc.compressor.foreseen import with_sizes
from ssmc.compressor.methods.channels.counts import able_widths
from ssmc.compressor.methods.states.counts import allowed_states
from ssmc.compressor.methods.width.counts import able_d_models, wants_twice
from ssmc.compressor.options.patterns import CHANNEL, COLUMN, HEAD, HEAD_DIM, WIDTH
from ssmc.runtime.models.architectures.experts import LATENT, MEMBER, Experts, Mixture
from ssmc.runtime.models.architectures.plan import CHANNEL as CHANNELS
from ssmc.runtime.models.architectures.plan import HEAD as HEADS
from ssmc.runtime.models.architectures.plan import MODEL, STATE
from ssmc.runtime.models.architectures.plan import Plan as Tabled
from ssmc.runtime.models.architectures.units import NEURON, Part

if TYPE_CHECKING:
    from ssmc.runtime.models.checkpoints import Checkpoint

Shapes = tuple[tuple[str, tuple[int, ...]], ...]
"""Names of tensors in a module and their shapes."""

LEVELS = 8  # shares of an axis that are tried at most: eighths
MOST = 300_000  # combinations; of models with more than six axes the shares are farther apart


@dataclass(frozen=True, order=True)
class Removed:
    """How much of each axis is gone, of those of which anything is."""

    shares: tuple[tuple[str, float], ...]

    @property
    def by_axis(self) -> dict[str, float]:
        """The shares by the name of the axis."""
        return dict(self.shares)


class HybridSizes:
    """The axes of a hybrid.

    Args:
        checkpoint: the dense model.
        axes: those that may be touched; None: all that its family has.
        runtime: that the result is for; None: any.
        round_to: as of `states_to_keep`.

    Attributes:
        axes: of those, the ones along which something of this model can go while nothing else does.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        axes: Sequence[str] | None = None,
        runtime: str | None = None,
        round_to: int | str = 1,
    ):
        self.architecture, self.config = checkpoint.architecture, checkpoint.config
        self.sizes: Any = checkpoint.dimensions
        self.runtime, self.round_to = runtime, round_to
        self.shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint.tensors().items()}
        self.parameters = sum(map(prod, self.shapes.values()))
        self._known: dict[Any, int] = {}  # what was counted already
        able, self.steps = axes_of_hybrid(self.architecture), LEVELS
        self.axes = [a for a in able if (axes is None or a in axes) and self.alone(a)]
        self.steps = min(LEVELS, int(MOST ** (1 / max(1, len(self.axes)))))

    def levels(self, axis: str) -> list[float]:
        """Shares of an axis that may go, rising, nothing among them."""
        total, allowed = self._counts(axis)
        wanted = [total * part / self.steps for part in range(1, self.steps)]
        near = {min(allowed, key=lambda n: (abs(total - n - goes), n)) for goes in wanted} if allowed else set()
        return sorted({0.0, *(round(1 - n / total, 6) for n in near)})

    def alone(self, axis: str) -> list[float]:
        """Those of the shares that may go while nothing else does, rising."""
        return [share for share in self.levels(axis)[1:] if self.fits(Removed(((axis, share),)))]

    def candidates(self) -> list[Removed]:
        """Every combination that a loader takes, the dense model left out."""
        found = []
        for shares in itertools.product(*(self.levels(axis) for axis in self.axes)):
            removed = Removed(tuple((a, s) for a, s in zip(self.axes, shares, strict=True) if s))
            if removed.shares and self.fits(removed):
                found.append(removed)
        return found

    def share_of_parameters(self, removed: Removed) -> float:
        """Parameters over the dense model's, exactly."""
        mixer, d_model = self.mixer(removed), self.d_model(removed)
        if (mixer, d_model) not in self._known:
            self._known[mixer, d_model] = self._saved_in_mixers(*mixer, d_model) + self._saved_elsewhere(d_model)
        saved = self._known[mixer, d_model]
        for module, parts in self._modules.items():
            kept = tuple(self.units(part, removed) for part in parts)
            if (module, kept, d_model) not in self._known:
                self._known[module, kept, d_model] = self._saved_in_units(parts, kept, d_model)
            saved += self._known[module, kept, d_model]
        return 1 - saved / self.parameters

    def mixer(self, removed: Removed) -> tuple[int, int, int]:
        """Heads, channels of each, and states of a group that stay; without heads as many "heads" of one channel."""
        gone, sizes = removed.by_axis, self.sizes
        inner = ((CHANNEL, sizes.d_inner), (HEAD_DIM, 1))
        if sizes.heads is not None:
            inner = ((HEAD, sizes.heads), (HEAD_DIM, sizes.head_dim))
        totals = (*inner, (COLUMN, sizes.d_state))
        heads, head_dim, states = (round(total * (1 - gone.get(axis, 0))) for axis, total in totals)
        return heads, head_dim, states

    def d_model(self, removed: Removed) -> int:
        """Coordinates of the residual stream that stay."""
        return round(self.sizes.d_model * (1 - removed.by_axis.get(WIDTH, 0)))

    def units(self, part: Part, removed: Removed) -> int:
        """How many units of a part stay, as the run counts them."""
        from ssmc.compressor.methods.units.counts import units_to_keep

        share = removed.by_axis.get(part.kind, 0)
        return units_to_keep(part, self.config, share) if share else part.total(self.config)

    def smaller(self, removed: Removed) -> Any:
        """The configuration of the stock model that is left."""
        heads, head_dim, states = self.mixer(removed)
        units = [(part, self.units(part, removed)) for part in self.architecture.units]
        return with_sizes(self.architecture, self.config, (heads, head_dim), states, units, self.d_model(removed))

    def fits(self, removed: Removed) -> bool:
        """Whether a loader takes heads, channels of heads and d_model together, and a run carries them out."""
        heads, head_dim, _ = self.mixer(removed)
        able, gone = self.architecture.capabilities, removed.by_axis
        if able.whole_expand and CHANNEL in gone and WIDTH in gone:
            return False
        return able.free_width or heads * head_dim % self.d_model(removed) == 0

    def _counts(self, axis: str) -> tuple[int, list[int]]:
        """How many there are of an axis, and how many may stay."""
        sizes, architecture = self.sizes, self.architecture
        if axis in (CHANNEL, WIDTH) and wants_twice(sizes, self.runtime):  # of a Jamba they do not go together
            return 1, []
        if axis == COLUMN:
            return sizes.d_state, [n for n in allowed_states(sizes.d_state, self.round_to) if n < sizes.d_state]
        if axis == CHANNEL:
            return sizes.d_inner, list(range(sizes.d_model, sizes.d_inner, sizes.d_model))
        if axis == HEAD:
            widths = able_widths(architecture, sizes, self.runtime)
            return sizes.heads, [width // sizes.head_dim for width in widths]
        if axis == WIDTH:
            return sizes.d_model, able_d_models(architecture, sizes, config=self.config)
        if axis == HEAD_DIM:
            return sizes.head_dim, list(range(1, sizes.head_dim))
        parts = [part for part in architecture.units if part.kind == axis and part.total(self.config)]
        if not parts or any(part.refusal(self.config) for part in parts):
            return 1, []
        largest = max(parts, key=lambda part: part.total(self.config))
        return largest.total(self.config), largest.allowed(self.config)

    def _saved_in_mixers(self, heads: int, head_dim: int, states: int, d_model: int) -> int:
        left = {MODEL: d_model, HEADS: heads, CHANNELS: heads * head_dim, STATE: states * self.sizes.groups}
        return sum(count * _saved(shapes, self.architecture.plan, left) for shapes, count in self._mixers.items())

    def _saved_elsewhere(self, d_model: int) -> int:
        """Of norms, embedding and head, which have one axis of d_model."""
        others = [shape for name, shape in self.shapes.items() if not name.startswith(self._tabled)]
        wide = sum(prod(shape) for shape in others if self.sizes.d_model in shape)
        return wide * (self.sizes.d_model - d_model) // self.sizes.d_model

    @cached_property
    def _tabled(self) -> tuple[str, ...]:
        """How the names of all tensors start that tables of mixers and of units have."""
        blocks = [self.architecture.block_prefix(layer) for layer in range(self.sizes.n_layer)]
        return (
            *self._mixer_prefixes,
            *{f"{block}{part.name}." for block in blocks for part in self.architecture.units},
        )

    def _saved_in_units(self, parts: Sequence[Part], kept: Sequence[int], d_model: int) -> int:
        """Of all modules that have these units, each with its own number of them."""
        totals = tuple(part.total(self.config) for part in parts)
        if kept == totals and d_model == self.sizes.d_model:
            return 0
        saved = 0
        for shapes, count in self._of_module(parts[0]).items():
            left = {MODEL: d_model}
            for part, number, total in zip(parts, kept, totals, strict=True):
                if isinstance(part, Mixture):
                    left[MEMBER if isinstance(part, Experts) else NEURON] = number
                    if f"{part.before}.weight" not in dict(shapes):  # experts read the stream themselves
                        left[LATENT] = d_model
                elif number < total or d_model < self.sizes.d_model:
                    chosen = part.selection(part.some(self.config, number), part.plan.sizes(dict(shapes)), self.config)
                    left |= {dimension: len(index) for dimension, index in chosen.items()}
            saved += count * _saved(shapes, parts[0].plan, left)
        return saved

    @cached_property
    def _modules(self) -> dict[tuple[str, str], tuple[Part, ...]]:
        """The parts that this model has some of, by the module they belong to and by what reads them there."""
        found: dict[tuple[str, str], tuple[Part, ...]] = {}
        for part in self.architecture.units:
            if part.total(self.config) and part.refusal(self.config) is None:
                key = (part.name, part.reader)
                found[key] = (*found.get(key, ()), part)
        return found

    @cached_property
    def _mixer_prefixes(self) -> list[str]:
        """How the names of the mixers' tensors start."""
        return [name.removesuffix("A_log") for name in self.shapes if name.endswith(".A_log")]

    @cached_property
    def _mixers(self) -> dict[Shapes, int]:
        """Shapes of a mixer -> how many there are."""
        return self._alike(self._mixer_prefixes, self.architecture.plan)

    def _of_module(self, part: Part) -> dict[Shapes, int]:
        """Shapes of a module with units -> how many there are."""
        reader = f"{part.reader}.down_proj" if isinstance(part, Mixture) else f"{part.reader}.weight"
        blocks = [self.architecture.block_prefix(layer) for layer in range(self.sizes.n_layer)]
        prefixes = [f"{block}{part.name}." for block in blocks]
        return self._alike([prefix for prefix in prefixes if prefix + reader in self.shapes], part.plan)

    def _alike(self, prefixes: Sequence[str], plan: Tabled) -> dict[Shapes, int]:
        found: dict[Shapes, int] = {}
        for prefix in prefixes:
            shapes = tuple((n, self.shapes[prefix + n]) for n in plan.tensors if prefix + n in self.shapes)
            found[shapes] = found.get(shapes, 0) + 1
        return found


def _saved(shapes: Shapes, plan: Tabled, left: Mapping[str, int]) -> int:
    """Parameters that tensors of these shapes lose where so many of some dimensions are left."""
    sizes = {**plan.sizes(dict(shapes)), **left}
    saved = 0
    for name, shape in shapes:
        axes = zip(plan.tensors[name], shape, strict=True)
        saved += prod(shape) - prod(sum(sizes[part] for part in parts) if parts else size for parts, size in axes)
    return saved
