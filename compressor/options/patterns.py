"""What can be removed and which scores decide what: the words that options are written in.

The words come from the methods themselves: each declares its pattern and its scores here when it is registered
(`ssmc.compressor.methods`), built-in ones and those of other packages alike. Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ssmc.compressor.options.sparsity import NM

COLUMN, CHANNEL, UNSTRUCTURED, LAYER, SSM_MODULE = "column", "channel", "unstructured", "layer", "ssm-module"
HEAD, HEAD_DIM, MLP, ATTENTION = "head", "head-dim", "mlp", "attention"
EXPERT, EXPERT_WIDTH, WIDTH = "expert", "expert-width", "width"
NOTHING = "none"  # to quantise alone
WEIGHTS = "weights"  # not a pattern: what the scores of projections and of conv1d decide about


@dataclass(frozen=True)
class Pattern:
    """One kind of thing that can be removed.

    Attributes:
        name: as `--pattern` has it.
        removes: what goes, in the plural: "states".
        help: a phrase about it, for the help text.
        default_score: the score that decides unless the user names another.
        combines: its place in a combined pattern such as column+channel; None: it stands alone.
        takes_scope: whether `--scope` says where it acts; a pattern that takes whole channels or layers has none.
        whole_blocks: whether nothing of a layer is left where it acts.
        refines: whether `--refine` goes with it, which moves mixers only.
    """

    name: str
    removes: str
    help: str
    default_score: str
    combines: int | None = None
    takes_scope: bool = False
    whole_blocks: bool = False
    refines: bool = True


@dataclass(frozen=True)
class ScoreName:
    """A score, as far as options need to know it."""

    name: str
    help: str  # what it goes by, a phrase behind its name
    needs_text: bool = True


_PATTERNS: dict[str, Pattern] = {}
_SCORES: dict[str, dict[str, ScoreName]] = {}  # by pattern


def declare_pattern(pattern: Pattern) -> None:
    """Make a pattern known to the options."""
    _PATTERNS[pattern.name] = pattern


def declare_score(pattern: str, score: ScoreName) -> None:
    """Make a score known as one that can decide about a pattern."""
    _SCORES.setdefault(pattern, {})[score.name] = score


def patterns() -> dict[str, Pattern]:
    """All patterns by name; every N:M besides, which counts as `unstructured`."""
    return {name: _PATTERNS[name] for name in sorted(_PATTERNS, key=_rank)}


def _rank(name: str) -> tuple[bool, bool, str]:
    """The default pattern first, then those that make a model smaller, then the others."""
    return name != COLUMN, _PATTERNS[name].combines is None, name


def combinable() -> tuple[str, ...]:
    """The patterns that can be joined by +, in the order in which they are written and carried out."""
    placed = [pattern for pattern in _PATTERNS.values() if pattern.combines is not None]
    return tuple(pattern.name for pattern in sorted(placed, key=lambda pattern: pattern.combines or 0))


def pattern_of(part: str) -> Pattern:
    """A part of a pattern; N:M counts as unstructured."""
    return _PATTERNS.get(part, _PATTERNS[UNSTRUCTURED])


def scores_of(part: str) -> tuple[str, ...]:
    """The scores that can decide about a pattern, or about one part of a combined one, its default first."""
    kind = part if part == WEIGHTS else pattern_of(part).name
    names = _SCORES.get(kind, {})
    first = "sparsegpt" if part == WEIGHTS else pattern_of(part).default_score
    return tuple(sorted(names, key=lambda name: name != first))


def score_names() -> tuple[str, ...]:
    """Every score of every pattern, each once, by the alphabet."""
    return tuple(sorted({name for kind, names in _SCORES.items() if kind != WEIGHTS for name in names}))


def described_scores(part: str) -> dict[str, str]:
    """What each score of a pattern goes by, the default first."""
    kind = part if part == WEIGHTS else pattern_of(part).name
    return {name: _SCORES[kind][name].help for name in scores_of(part)}


def looks_at_text(part: str, score: str) -> bool:
    """Whether a score needs the model to be run on text."""
    kind = part if part == WEIGHTS else pattern_of(part).name
    return _SCORES[kind][score].needs_text


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
    words, able = pattern.split("+"), combinable()
    if len(words) == 1 and (pattern in _PATTERNS or parse_nm(pattern)):
        return (pattern,)
    if len(words) == 1:
        raise ValueError(f"it is one of {', '.join(patterns())}, or N:M such as 2:4, or several with + between")
    if alone := [word for word in words if word not in able]:
        raise ValueError(f"{' and '.join(map(repr, alone))} cannot be combined; {', '.join(able)} can")
    if len(set(words)) < len(words):
        raise ValueError("a part is named twice")
    return tuple(part for part in able if part in words)


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
