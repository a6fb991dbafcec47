"""Sizes of each layer by itself: what a layer costs when it alone is pruned, and which layers give how much.

A layer whose pruning moves the model's predictions little gives more than others. Stock loaders have one size for all
layers; only runtimes that take each layer as it is (our ONNX graphs) gain by this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ssmc.compressor.options.patterns import CHANNEL, COLUMN
from ssmc.compressor.search.allocation import Curve
from ssmc.runtime.models.families import Dimensions

LEAST_WEIGHT = 0.02
"""Of a layer, in units of the mean layer's: a few texts cannot tell that a layer may be cut away for nothing."""


@dataclass(frozen=True, order=True)
class Layerwise:
    """A model with all of its layers, each with its own channels and states."""

    widths: tuple[int, ...]  # d_inner of each layer
    states: tuple[int, ...]  # d_state of each layer

    def blocks(self) -> list[tuple[int, int]]:
        """(d_inner, d_state) of every block, as a latency table takes them."""
        return list(zip(self.widths, self.states, strict=True))

    def parts(self, dense: Dimensions) -> list[str]:
        """What is removed anywhere."""
        removed = {COLUMN: min(self.states) < dense.d_state, CHANNEL: min(self.widths) < dense.d_inner}
        return [part for part, gone in removed.items() if gone]


@dataclass(frozen=True)
class LayerLosses:
    """The excess loss of a model as a sum over layers: the uniform model's curve, shared out among the layers.

    Attributes:
        dense: sizes of the dense model.
        curves: by part, the loss of pruning all layers alike.
        weights: by part and layer, the layer's share of that loss; they add up to 1.
    """

    dense: Dimensions
    curves: Mapping[str, Curve]
    weights: Mapping[str, Sequence[float]]

    def of_block(self, layer: int, block: tuple[int, int]) -> float:
        """Nats a token that one layer costs at (d_inner, d_state)."""
        shares = {CHANNEL: 1 - block[0] / self.dense.d_inner, COLUMN: 1 - block[1] / self.dense.d_state}
        return sum(self.weights[part][layer] * self.curves[part].at(shares[part]) for part in self.weights)

    def __call__(self, sizes: Layerwise) -> float:
        """Nats a token."""
        return sum(self.of_block(layer, block) for layer, block in enumerate(sizes.blocks()))


def shared_out(measured: Sequence[float]) -> list[float]:
    """Weights of the layers, adding up to 1, from what each cost when it alone was pruned."""
    mean = sum(measured) / len(measured)
    if mean <= 0:
        return [1 / len(measured)] * len(measured)
    raised = [max(cost, LEAST_WEIGHT * mean) for cost in measured]
    return [cost / sum(raised) for cost in raised]


@dataclass(frozen=True)
class BlockLimit:
    """What all blocks may cost together at most.

    Attributes:
        cost: of a block (d_inner, d_state), in any unit.
        most: of their sum.
    """

    cost: Callable[[int, int], float]
    most: float


def allocate(
    dense: Dimensions,
    widths: Sequence[int],
    states: Sequence[int],
    loss: Callable[[int, tuple[int, int]], float],
    limits: Sequence[BlockLimit],
) -> Layerwise | None:
    """Who gives how much: the steps that cost the least loss for what they save, until all limits are met.

    Greedy, which is optimal where losses are convex and savings even (Shannon's bit allocation), and close to it here;
    what the last step saved too much is given back where that helps most.

    Args:
        dense: sizes of the dense model.
        widths: allowed d_inner, rising; the search starts from the last.
        states: allowed d_state, likewise.
        loss: of a layer at (d_inner, d_state).
        limits: to meet.

    Returns:
        None if even the smallest sizes do not meet the limits.
    """
    blocks = [(widths[-1], states[-1])] * dense.n_layer
    while excess := _excess(blocks, limits):
        best = min(_steps(blocks, widths, states, loss, excess), default=None)
        if best is None:
            return None
        _, layer, block = best
        blocks[layer] = block
    for layer in sorted(range(dense.n_layer), key=lambda layer: -loss(layer, blocks[layer])):
        wider = [(w, n) for w in widths for n in states if w >= blocks[layer][0] and n >= blocks[layer][1]]
        allowed = [b for b in wider if not _excess([*blocks[:layer], b, *blocks[layer + 1 :]], limits)]
        blocks[layer] = min(allowed, key=lambda b: (loss(layer, b), b), default=blocks[layer])
    return Layerwise(*(tuple(sizes) for sizes in zip(*blocks, strict=True)))


def _excess(blocks: Sequence[tuple[int, int]], limits: Sequence[BlockLimit]) -> list[tuple[BlockLimit, float]]:
    """The limits that are not met, with what is missing."""
    sums = [(limit, sum(limit.cost(*block) for block in blocks) - limit.most) for limit in limits]
    return [(limit, excess) for limit, excess in sums if excess > 1e-12 * abs(limit.most)]


def _steps(
    blocks: Sequence[tuple[int, int]],
    widths: Sequence[int],
    states: Sequence[int],
    loss: Callable[[int, tuple[int, int]], float],
    excess: Sequence[tuple[BlockLimit, float]],
) -> Iterator[tuple[float, int, tuple[int, int]]]:
    """(loss per saving, layer, its new sizes) of everything one layer could give; savings beyond need do not count."""
    for layer, (width, count) in enumerate(blocks):
        before = loss(layer, (width, count))
        narrower = [(w, count) for w in widths if w < width] + [(width, n) for n in states if n < count]
        for block in narrower:
            saved = [(limit.cost(width, count) - limit.cost(*block)) / missing for limit, missing in excess]
            gain = sum(min(part, 1.0) for part in saved)
            if gain > 0:
                yield (loss(layer, block) - before) / gain, layer, block
