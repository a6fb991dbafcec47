"""What can be removed and how it is judged: patterns, their parts, their scores, and values given for each part."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from ssmc.compressor.methods.weights.masks import NM

COLUMN, CHANNEL, UNSTRUCTURED, LAYER, SSM_MODULE = "column", "channel", "unstructured", "layer", "ssm-module"
PATTERNS = (COLUMN, CHANNEL, LAYER, UNSTRUCTURED, SSM_MODULE)  # and every N:M
COMBINABLE = (LAYER, COLUMN, CHANNEL)  # with + between them; written, and carried out, in this order


class Score(StrEnum):
    """How the importance of a state, of a channel, of an entry of A_log, or of a whole layer is judged."""

    magnitude = "magnitude"
    random = "random"
    sparsessm_vote = "sparsessm-vote"
    sparsessm = "sparsessm"
    sparsessm_l2 = "sparsessm-l2"
    energy = "energy"
    ghost = "ghost"
    exact = "exact"
    sparsegpt = "sparsegpt"
    obs = "obs"
    activation = "activation"
    mamba_shedder = "mamba-shedder"
    similarity = "similarity"


BLIND = (Score.magnitude, Score.random)  # look at no text

_PAPER = (Score.sparsessm_vote, Score.sparsessm, Score.sparsessm_l2, Score.energy)
_ENTRIES = (Score.ghost, *BLIND, *_PAPER, Score.sparsegpt)
_BLOCKS = (Score.mamba_shedder, Score.random)

# Which scores a pattern can be judged by, its default first.
_SCORES = {
    COLUMN: (Score.exact, *BLIND, *_PAPER, Score.ghost),
    CHANNEL: (Score.obs, Score.activation, *BLIND),
    UNSTRUCTURED: _ENTRIES,
    LAYER: (Score.mamba_shedder, Score.similarity, Score.random),
    SSM_MODULE: _BLOCKS,
}


def scores_of(part: str) -> tuple[Score, ...]:
    """The scores a pattern, or one part of a combined one, can be judged by, its default first."""
    return _SCORES.get(part, _ENTRIES)  # N:M on A_log judges entries, as unstructured does


def parse_nm(pattern: str) -> NM | None:
    """A pattern as N:M, None if it is none.

    Raises:
        UsageError: N and M do not make sense.
    """
    match = re.fullmatch(r"(\d{1,3}):(\d{1,3})", pattern)
    return NM(int(match[1]), int(match[2])) if match else None


def parse_pattern(pattern: str) -> tuple[str, ...]:
    """The parts of a pattern, in the order they are carried out: one, unless there is a + in it.

    Raises:
        ValueError: a part is unknown, named twice, or cannot be combined.
        UsageError: it is an N:M that makes no sense.
    """
    words = pattern.split("+")
    if len(words) == 1 and (pattern in PATTERNS or parse_nm(pattern)):
        return (pattern,)
    if len(words) == 1:
        raise ValueError(f"it is one of {', '.join(PATTERNS)}, or N:M such as 2:4, or several with + between")
    if alone := [word for word in words if word not in COMBINABLE]:
        raise ValueError(f"{' and '.join(map(repr, alone))} cannot be combined; {', '.join(COMBINABLE)} can")
    if len(set(words)) < len(words):
        raise ValueError("a part is named twice")
    return tuple(part for part in COMBINABLE if part in words)


def parse_values(value: Any) -> Any:
    """A value as the user wrote it: a plain one, or "part=value,part=value" as a mapping.

    Raises:
        ValueError: it is neither.
    """
    if not isinstance(value, str) or "=" not in value:
        return value
    pairs = [pair.partition("=") for pair in value.split(",")]
    if not all(name and sign and content for name, sign, content in pairs):
        raise ValueError("it is one value, or part=value for each part of the pattern, with commas between")
    values = {name.strip(): content.strip() for name, _, content in pairs}
    if len(values) < len(pairs):
        raise ValueError("a part is named twice")
    return values


def check_parts(values: Mapping[Any, Any], parts: tuple[str, ...]) -> None:
    """Refuse values for no part, or for what is none of the pattern's.

    Raises:
        ValueError: naming them.
    """
    if not values:
        raise ValueError("it names no part of the pattern")
    if unknown := [str(name) for name in values if name not in parts]:
        raise ValueError(f"{', '.join(unknown)} is no part of the pattern {'+'.join(parts)}")
