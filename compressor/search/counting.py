"""What is known of a smaller model by counting alone: its parameters, and the memory it takes with its sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

from ssmc.compressor.families import searched_parts
from ssmc.compressor.methods.counts import default_multiple
from ssmc.compressor.methods.width.counts import able_d_models, wants_twice
from ssmc.compressor.options.config import CompressConfig
from ssmc.compressor.options.goal import Goal
from ssmc.compressor.options.patterns import CHANNEL, COLUMN, HEAD, HEAD_DIM, LAYER, WIDTH
from ssmc.compressor.search.allocation import Limit, Sizes, enumerate_sizes, part_of_width, removable_layers
from ssmc.compressor.search.layer_sizes import Layerwise
from ssmc.runtime.errors import UsageError
from ssmc.runtime.models.checkpoints import Checkpoint, parameter_counter
from ssmc.runtime.models.memory import format_bytes, sequence_memory
from ssmc.runtime.models.outline import outline


@dataclass
class Counting:
    """Sizes of smaller models, and what follows from them without running anything.

    Attributes:
        checkpoint: the dense model; it is not changed.
        config: what may be removed and how, its sparsity aside.
        goal: what to meet.
    """

    checkpoint: Checkpoint
    config: CompressConfig
    goal: Goal

    def __post_init__(self) -> None:
        self.dense, self.uniform = self.checkpoint.dimensions, self.checkpoint.architecture.capabilities.uniform
        self._count = parameter_counter(self.checkpoint.config)
        self.parameters = self._count(*asdict(Sizes.of(self.dense)).values())
        # of a hybrid only the whole is known, which is all that is asked for: its layers and widths stay
        self.parameters_outside = self._count(0, self.dense.d_inner, self.dense.d_state) if self.uniform else 0
        self.outline = outline(self.checkpoint)

    @property
    def able(self) -> list[str]:
        """The parts that a pattern may have here."""
        return searched_parts(self.checkpoint.architecture)

    def share_of_parameters(self, sizes: Sizes | Layerwise) -> float:
        """Parameters over the dense model's, exactly."""
        if isinstance(sizes, Sizes) and (sizes.d_model or not self.uniform):
            return self._count(*asdict(sizes).values()) / self.parameters
        return (self.parameters_outside + sum(self.parameters_of(*block) for block in sizes.blocks())) / self.parameters

    def parameters_of(self, d_inner: int, d_state: int) -> int:
        """Of one block."""
        return self._count(1, d_inner, d_state) - self.parameters_outside

    def memory(self, sizes: Sizes | Layerwise) -> int:
        """Bytes of the weights, as they are stored, and of the goal's sequences."""
        weights = self.outline.weight_bytes * self.share_of_parameters(sizes)
        if isinstance(sizes, Layerwise):
            sequence = sum(self.sequence_bytes(1, *block) for block in sizes.blocks())
        else:
            sequence = self.sequence_bytes(*asdict(sizes).values())
        return round(weights + self.goal.batch * sequence)

    def sequence_bytes(self, n_layer: int, d_inner: int, d_state: int, d_model: int = 0) -> int:
        """Of one sequence of the goal's length in a model of these sizes; d_model is no part of it."""
        sizes = replace(self.dense, n_layer=n_layer, d_inner=d_inner, d_state=d_state)
        kept = self.checkpoint.architecture.kept_per_token(self.checkpoint.config)
        return sequence_memory(sizes, kept, self.goal.length, self.outline.stored_dtype).total

    def share_of_memory(self, sizes: Sizes | Layerwise) -> float:
        """Bytes over the dense model's."""
        return self.memory(sizes) / self.memory(Sizes.of(self.dense))

    def counted_limits(self) -> list[Limit]:
        """Those that need no clock."""
        limits, goal = [], self.goal
        if goal.target_params is not None:
            limits.append(Limit("parameters", self.share_of_parameters, goal.target_params))
        if goal.target_memory is not None:
            whole = self.memory(Sizes.of(self.dense))
            what = f"for {goal.sequences_text}"

            def told(share: float) -> str:
                return f"{format_bytes(round(share * whole))} {what}"

            def least(share: float) -> str:
                return format_bytes(round(share * whole))

            limits.append(Limit("memory", self.share_of_memory, goal.target_memory / whole, told, least))
        return limits

    def allowed(self, least_width: int | None = None, least_states: int = 1) -> tuple[list[int], list[int]]:
        """The widths and the numbers of states that the pattern may leave, rising, the dense model's last.

        Args:
            least_width: the smallest that is of use; by default a quarter.
            least_states: likewise.
        """
        config, dense = self.config, self.dense
        states, widths = [dense.d_state], [dense.d_inner]
        if COLUMN in config.parts:
            step = config.round_to
            every = range(1, dense.d_state + 1)
            states = [n for n in every if (n & (n - 1) == 0 if isinstance(step, str) else n % step == 0)]
            states = sorted({*(n for n in states if n >= least_states), dense.d_state})
        if CHANNEL in config.parts:
            step = config.round_channels or default_multiple(dense.d_inner)
            least = dense.d_inner // 4 if least_width is None else least_width
            widths = sorted({*(w for w in range(step, dense.d_inner, step) if w >= least), dense.d_inner})
        if self.coupled and dense.heads is not None:
            widths = [*self._widths_of_heads(), dense.d_inner]
        return widths, states

    def _widths_of_heads(self) -> list[int]:
        """The widths of a Mamba-2 that leave a whole d_model of as large a part, at least half of it, rising."""
        dense, parts = self.dense, self.config.parts
        ratio, step = Fraction(dense.d_model, dense.d_inner), default_multiple(dense.d_model)
        rising = range(-(-dense.d_inner // 2), dense.d_inner)
        whole = [w for w in rising if w % dense.heads == 0 or part_of_width(dense, w) == HEAD]
        able = [w for w in whole if part_of_width(dense, w) in parts and (w * ratio).denominator == 1]
        return [w for w in able if w * ratio % step == 0] or able

    def candidates(self) -> list[Sizes]:
        """Every combination of what the pattern may remove, the dense model left out."""
        dense = self.dense
        widths, states = self.allowed()
        layers = removable_layers(dense.n_layer) if LAYER in self.config.parts else [dense.n_layer]
        d_models = [0]
        if WIDTH in self.config.parts:  # as of layers, at least half of it stays
            able = able_d_models(self.checkpoint.architecture, dense, self.config.round_channels)
            d_models += [count for count in able if 2 * count >= dense.d_model]
        if self.coupled:
            d_models += [w * dense.d_model // dense.d_inner for w in widths if w < dense.d_inner]
            d_models = sorted({*d_models})
        every = enumerate_sizes(layers, widths, states, d_models)
        return [sizes for sizes in every if sizes != Sizes.of(dense) and self._fits(sizes)]

    @property
    def coupled(self) -> bool:
        """Whether d_inner and width go by one ratio: for a runtime that wants twice d_model, or where heads go."""
        parts = {*self.config.parts}
        if self.dense.heads is not None:
            return WIDTH in parts and bool(parts & {HEAD, HEAD_DIM})
        return {CHANNEL, WIDTH} <= parts and wants_twice(self.dense, self.config.runtime)

    def _fits(self, sizes: Sizes) -> bool:
        d_model = sizes.d_model or self.dense.d_model
        return not self.coupled or sizes.d_inner * self.dense.d_model == self.dense.d_inner * d_model


def require_reachable(counting: Counting) -> None:
    """Refuse, before any work, a goal that counting alone shows to be out of reach, or met already.

    Raises:
        UsageError: naming the least that can be reached.
    """
    goal, limits = counting.goal, counting.counted_limits()
    whole = counting.memory(Sizes.of(counting.dense))
    if goal.target_memory is not None and whole <= goal.target_memory and goal.only_memory:
        raise UsageError(
            f"The dense model takes {format_bytes(whole)} for {goal.sequences_text}, no more than the "
            f"{format_bytes(goal.target_memory)} asked for: nothing has to be removed. Ask for less memory, or for "
            "more or longer sequences."
        )
    if not goal.needs_time:
        require_one(counting.config, counting.candidates(), limits, counting.able)


def require_one(
    config: CompressConfig, candidates: Sequence[Any], limits: Sequence[Limit], able: Sequence[str]
) -> None:
    """Refuse where no candidate is within all limits.

    Args:
        config: the run.
        candidates: what the pattern may leave.
        limits: of the goal.
        able: the parts that a pattern of a search may have for this family.

    Raises:
        UsageError: naming the least that can be reached.
    """
    if not candidates:
        raise UsageError(f"The pattern {config.pattern} leaves nothing to choose from for this model.")
    if any(all(limit.allows(sizes) for limit in limits) for sizes in candidates):
        return
    reach = [
        f"{limit.told(limit.most)} (the least is {limit.least(min(map(limit.cost, candidates)))})" for limit in limits
    ]
    more = [part for part in able if part not in config.parts]
    raise UsageError(
        f"The pattern {config.pattern} cannot reach {' and '.join(reach)} of this model here. Allow that much"
        + (f", or let more go with --pattern {'+'.join((*config.parts, *more))}." if more else ".")
    )
