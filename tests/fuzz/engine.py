"""Run a target on mutations of its seeds, in this process; every failure is kept, one of a kind."""

from __future__ import annotations

import faulthandler
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz.guard import Violation, check
from tests.fuzz.targets import SEEDS, Seed, Target

STUCK = 150.0  # seconds after which the process ends, with a traceback: a library that no signal reaches


@dataclass
class Outcome:
    """What a run found.

    Attributes:
        tried: inputs.
        read: of them without an error.
        failures: what did not hold, by kind and place: the message, the seed's name and the input.
    """

    tried: int = 0
    read: int = 0
    failures: dict[str, tuple[str, str, bytes]] = field(default_factory=dict)


def fuzz(
    target: Target,
    examples: int,
    number: int,
    *,
    read: Callable[[Path], object] | None = None,
    folder: Path | None = None,
    stuck: bool = False,
    current: Path | None = None,
) -> Outcome:
    """Read a target's seeds, and then mutations of them.

    Args:
        target: what is read.
        examples: how many inputs.
        number: the seed of the random numbers; the same one gives the same inputs.
        read: another function than the target's.
        folder: what may be written to; the seed's own by default.
        stuck: end the process where one input takes more than STUCK seconds.
        current: file that holds the input that is being read, should the process end there.
    """
    outcome = Outcome()
    choices = st.one_of(*(one.mutations().map(lambda content, one=one: (one, content)) for one in target.seeds))

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(choices)
    def attempt(choice: tuple[Seed, bytes]) -> None:
        one, content = choice
        if stuck:
            faulthandler.dump_traceback_later(STUCK, exit=True)
        try:
            outcome.tried += 1
            if current is not None:
                current.write_bytes(content)
            outcome.read += try_one(target, one, content, read, folder)
        except Violation as violation:
            outcome.failures.setdefault(f"{violation.kind} {violation.place}", (str(violation), one.name, content))
        finally:
            faulthandler.cancel_dump_traceback_later()

    for one in target.seeds:  # everything that is imported or compiled once
        (read or target.read)(one.file)
    attempt()
    return outcome


def try_one(
    target: Target,
    one: Seed,
    content: bytes,
    read: Callable[[Path], object] | None = None,
    folder: Path | None = None,
) -> bool:
    """Read one input in the place of a seed, which is put back.

    Returns:
        Whether it was read without an error.

    Raises:
        Violation: a property does not hold.
    """
    valid = one.file.read_bytes()
    one.file.write_bytes(content)
    size = sum(file.stat().st_size for file in one.file.parent.iterdir() if file.is_file())
    try:
        return check(lambda: (read or target.read)(one.file), folder or one.file.parent, size, target.times)
    finally:
        one.file.write_bytes(valid)


def kept(target: Target) -> list[tuple[Seed, Path]]:
    """Inputs that were once read wrongly, with the seeds they stand for."""
    named = {one.name: one for one in target.seeds}
    return [(named[path.name.split("--")[0]], path) for path in sorted((SEEDS / target.name).glob("*--*"))]
