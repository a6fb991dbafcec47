"""What an evaluation was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ssmc.runtime.errors import UsageError
from ssmc.runtime.scan.rounding import state_format


@dataclass(frozen=True)
class EvalSettings:
    """What was asked for, checked."""

    tasks: tuple[str, ...]  # lm-eval's names, each once
    limit: int | None  # documents of each task, from the start; None: all
    window: int  # tokens of a window of perplexity, as asked for; Perplexity.window says what was used
    max_windows: int | None  # windows of perplexity, from the start; None: all
    batch_size: int  # sequences at once in tasks; changes the speed, not the scores

    state_dtype: str = "float32"  # how SSM states are kept between tokens, of torch's models but the first

    def __post_init__(self) -> None:
        state_format(self.state_dtype)
        for name, least in (("limit", 1), ("window", 2), ("max_windows", 1), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name} must be at least {least}, not {value}.")


def task_names(tasks: str | Sequence[str]) -> tuple[str, ...]:
    """Names as the user gave them ("piqa,arc_easy" or a sequence), each once, in that order.

    Raises:
        UsageError: an empty name.
    """
    named = tasks.split(",") if isinstance(tasks, str) and tasks else tasks
    names = [name.strip() for name in named]
    if not all(names):
        raise UsageError("A task has an empty name. Give names with commas between, such as piqa,arc_easy.")
    return tuple(dict.fromkeys(names))
