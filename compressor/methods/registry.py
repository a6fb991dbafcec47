"""The public registry: methods and scores, built-in ones and those of other packages alike.

A score of states, in one file, from anywhere:

    from ssmc.compressor.methods.registry import register_score
    from ssmc.compressor.methods.states.score import StateScore

    @register_score
    class StateEnergy(StateScore):
        name = "state-energy"
        help = "removes the states with the least energy"
        needs = ("readout",)                                # which sums to collect, see `states.sums`

        def importance(self, layer):                        # (D, N), one number for each entry of A_log
            return layer.sums["readout"].states.t()

    ssmc.compress("tiny", score="state-energy")

From then on `--score state-energy` works too, where the file is imported first; a package that declares the entry point
`ssmc.methods` is imported by the command line itself.

A method, such as a new pattern, is an instance of a subclass of `Method`, handed to `register_method`; see `Method` for
what it may say and `states/method.py` for one that says all of it.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Protocol, TypeVar

from ssmc.compressor.methods.method import Method, Record
from ssmc.compressor.options.patterns import ScoreName, declare_pattern, declare_score, pattern_of

ENTRY_POINTS = "ssmc.methods"
"""The group of entry points whose modules the command line imports, so that they can register what they have."""


class Score(Protocol):
    """What the registry must know of a score; each kind of thing that is removed has a class of its own for them.

    Attributes:
        name: as `--score` has it.
        help: what it goes by, a phrase that follows the name: "removes the states with the least energy".
        decides: the patterns it can decide about.
        needs_text: whether the model is run on text for it.
    """

    name: str
    help: str
    decides: tuple[str, ...]
    needs_text: bool


S = TypeVar("S", bound=type)

_METHODS: dict[str, Method] = {}
_SCORES: dict[tuple[str, str], Score] = {}  # by pattern and name


def register_method(method: Method) -> None:
    """Make a method known: its pattern to the options, its work to the pipeline.

    Raises:
        ValueError: another method has its name.
    """
    taken = _METHODS.get(method.name)
    if taken is not None and type(taken) is not type(method):
        raise ValueError(f"there is a method {method.name!r} already: {type(taken).__module__}")
    _METHODS[method.name] = method
    Record.named.update(method.leaves)
    if method.pattern is not None:
        declare_pattern(method.pattern)


def register_score(score: S) -> S:
    """Make a score known, for the patterns it decides about; a decorator of its class, which is instantiated once.

    Raises:
        ValueError: another score of the same pattern has its name.
    """
    instance: Score = score()
    for pattern in instance.decides:
        taken = _SCORES.get((pattern, instance.name))
        if taken is not None and type(taken).__qualname__ != score.__qualname__:
            raise ValueError(f"there is a score {instance.name!r} of {pattern} already: {type(taken).__module__}")
        _SCORES[pattern, instance.name] = instance
        declare_score(pattern, ScoreName(instance.name, instance.help, instance.needs_text))
    return score


def methods() -> tuple[Method, ...]:
    """All methods, in the order in which they work on a layer."""
    return tuple(sorted(_METHODS.values(), key=lambda method: method.place))


def score(part: str, name: str) -> Score:
    """A score by the part of a pattern it decides about (N:M counts as unstructured) and its name."""
    return _SCORES[part if (part, name) in _SCORES else pattern_of(part).name, name]


def load_entry_points() -> list[str]:
    """Import what other installed packages register, see `ENTRY_POINTS`.

    Returns:
        A sentence for each that cannot be imported; the others are registered.
    """
    problems = []
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception as error:  # whatever another package's module raises
            problems.append(
                f"The methods of {entry.value} cannot be used ({type(error).__name__}: {error}). Correct or remove it."
            )
    return problems
