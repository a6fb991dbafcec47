"""Numbers that stay: the nearest that is allowed, or those that the user lists."""

from __future__ import annotations

from collections.abc import Sequence

from ssmc.runtime.errors import UsageError

MULTIPLES = (64, 32, 16, 8, 4, 2, 1)  # of channels, the most hardware-friendly first
STEPS = 8  # widths to choose between, at least, for a multiple to be the default


def nearest(allowed: Sequence[int], wanted: float) -> int:
    """The allowed number that is nearest to the wanted one, ties to the smaller."""
    return min(allowed, key=lambda k: (abs(k - wanted), k))


def listed(name: str, counts: tuple[int, ...], most: int, layers: int) -> tuple[int, ...]:
    """The user's own numbers, one a layer, once they fit the model.

    Raises:
        UsageError: there are too few or too many, or one is larger than what the layer has.
    """
    if len(counts) != layers:
        raise UsageError(f"{name} names {len(counts)} layers, the model has {layers}. Give one number for each.")
    if max(counts) > most:
        raise UsageError(f"{name} keeps {max(counts)} in a layer that has {most}. Use at most {most}.")
    return counts


def default_multiple(width: int) -> int:
    """64 channels, what matrix products on all hardware like, or the largest smaller power of two with enough steps."""
    return next((m for m in MULTIPLES if width >= STEPS * m), 1)
