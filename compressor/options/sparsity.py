"""How much goes: a part of all entries, N of every M, or a part that differs from layer to layer (Eq. 7)."""

from __future__ import annotations

from dataclasses import dataclass

from ssmc.runtime.errors import UsageError


@dataclass(frozen=True)
class NM:
    """N:M sparsity: of every `m` consecutive entries exactly `n` are KEPT, so 2:4 keeps 2 of 4.

    This is how NVIDIA's hardware and the SparseGPT paper count. SparseSSM's published code is inconsistent about it: N
    is the number pruned in one of its files and the number kept in another. For 2:4 and 4:8 both readings agree.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise UsageError(f"The pattern {self} does not work: n of every m entries are kept, 0 < n < m, as in 2:4.")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        """The part that is removed."""
        return 1 - self.n / self.m


ALPHA = 0.04
"""How far the sparsities of in_proj and out_proj spread over the layers (Eq. 7 of SparseSSM): the paper's number."""

Sparsity = float | NM
"""How much goes: a part of all entries inside [0, 1), or an N:M pattern."""


def check_groups(length: int, pattern: NM) -> None:
    """Refuse an axis that is not made of whole groups.

    Raises:
        UsageError: m does not divide `length`.
    """
    if length % pattern.m:
        raise UsageError(
            f"The pattern {pattern} needs whole groups of {pattern.m} entries, but the axis has {length}. "
            "Leave this tensor out or use a pattern whose m divides it."
        )


def check_ramp(sparsity: float, alpha: float) -> None:
    """Refuse a ramp of sparsities (Eq. 7) that leaves (0, 1).

    Raises:
        UsageError: what is wrong and the largest alpha that works.
    """
    room = min(sparsity, 1 - sparsity)
    if room <= 0:
        raise UsageError(f"sparsity {sparsity} does not work: it is the part that is removed, between 0 and 1.")
    if not 0 <= alpha < room:
        raise UsageError(
            f"alpha {alpha:g} does not work with sparsity {sparsity:g}: sparsities from {sparsity - alpha:g} to "
            f"{sparsity + alpha:g} must lie between 0 and 1. Use an alpha of at least 0 and below {room:g}."
        )
