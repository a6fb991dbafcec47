"""What an export format is: one object that says what it takes, writes it, and proves what it wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ssmc.runtime.errors import UsageError
from ssmc.runtime.progress import NO_PROGRESS, Progress

if TYPE_CHECKING:
    import torch

    from ssmc.exporters.cutting import Shrunk
    from ssmc.exporters.runtimes import Runtime
    from ssmc.exporters.source import Source, Tokens
    from ssmc.exporters.verify import Comparison, Way
    from ssmc.runtime.models.families import Architecture


def option(help: str, default: Any = None, *, choices: Sequence[str] = (), shown: str | None = None) -> Any:
    """A field of a format's `Options`, with what the command line says of it.

    Args:
        help: a sentence for people.
        default: None means: as the format sees fit.
        choices: the words a user may choose from; none: any text, or a switch where `default` is False.
        shown: what to call the default.
    """
    return field(default=default, metadata={"help": help, "choices": tuple(choices), "shown": shown})


@dataclass(frozen=True)
class NoOptions:
    """Of a format that leaves nothing to choose."""


@dataclass(frozen=True)
class Job:
    """One export on its way.

    Attributes:
        source: the model it starts from.
        shrunk: what is to be written.
        options: of the format, as its `Options`.
        tokens: what the model and what is written are run on.
        progress: told what is being done.
        extra: what the format found out while it prepared; its own business.
    """

    source: Source
    shrunk: Shrunk
    options: Any
    tokens: Tokens
    progress: Progress = NO_PROGRESS
    extra: Any = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that is to be written, by transformers' names, in memory at once.

        Those of `shrunk` are read from their files one by one when they are used, for formats that stream.
        """
        from ssmc.runtime.models.checkpoints.deferred import real  # loads torch

        return {name: real(tensor) for name, tensor in self.shrunk.tensors.items()}


@dataclass(frozen=True)
class Table:
    """A table for people: rows of as many cells as there are columns."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Proof:
    """What a format found out about what it wrote.

    Attributes:
        comparison: with the model it was made from.
        ways: the ways it was run one by one, where there is more than one.
        about: for the manifest.
        remarks: sentences for people.
        tables: for people.
        details: the same as numbers, in a class of the format's own; None where there is no more to say.
    """

    comparison: Comparison
    ways: tuple[Way, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    details: Any = None


class Format:
    """An export format. A subclass fills in what it needs; `register_format` makes it known.

    Attributes:
        name: as the user names it, and the folder it is written to.
        help: what it is, for the command line.
        Options: a dataclass of what a user may choose, made of `option` fields.
        packages: that it needs beside those of ssmc.
        extra: the optional dependencies of ssmc that bring them.
        takes_dense: whether it exports models that were not compressed, too.
        uneven: whether every layer may have sizes of its own.
        whole_model: whether it needs all of the model in memory; others get tensors that are read when they are wanted.
        at_once: bytes of memory for each parameter that it needs nevertheless, to write or to prove what it wrote.
    """

    name: ClassVar[str]
    help: ClassVar[str]
    Options: ClassVar[type] = NoOptions
    packages: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = ""
    takes_dense: ClassVar[bool] = False
    uneven: ClassVar[bool] = False
    whole_model: ClassVar[bool] = False
    at_once: ClassVar[int] = 0

    def missing(self, architecture: Architecture) -> str | None:
        """Why models of this family cannot be exported to this format; None where they can."""
        return None

    def settings(self, given: Mapping[str, Any]) -> Any:
        """The format's `Options` from those a user gave, by name; None stands for not given.

        Raises:
            UsageError: a value makes no sense.
        """
        return self.Options(**{name: value for name, value in given.items() if value is not None})

    def folder(self, options: Any) -> str:
        """Name of the folder inside an artefact that it is written to."""
        return self.name

    def foresee(self, architecture: Architecture, config: Any, tokenizer: Path | None) -> None:
        """Refuse what `prepare` would, as far as a configuration and a tokenizer's files tell.

        Raises:
            SsmcError: no export of the model, pruned or not, goes into this format.
        """

    def prepare(self, job: Job) -> Job:
        """What is to be written in this format, from the smaller model; refuses what it cannot hold.

        Raises:
            SsmcError: the model does not go into this format.
        """
        return job

    def holds_codes(self, job: Job) -> bool:
        """Whether the codes of a quantised model are written as they are, and not the numbers they stand for."""
        return False

    def space(self, job: Job) -> int:
        """Bytes needed on disk while it is written."""
        raise NotImplementedError

    def write(self, job: Job, folder: Path) -> list[Path]:
        """Write the model into an empty folder, and return its files."""
        raise NotImplementedError

    def weight_bytes(self, job: Job, folder: Path) -> int:
        """Bytes of all tensors as they were written."""
        raise NotImplementedError

    def verify(self, job: Job, folder: Path) -> Proof:
        """Read what was written and run it beside the model it was made from.

        Raises:
            VerificationError: it computes something else.
        """
        raise NotImplementedError

    def runs_where(self, job: Job) -> Sequence[Runtime]:
        """Which software takes it."""
        return ()

    def next(self, directory: str, artefact: str) -> str:
        """The command a user may want next, given the folder of the export and the artefact as an argument."""
        return f"ssmc bench{artefact}"


def option_names(format: Format) -> list[str]:
    """The names of a format's options."""
    return [item.name for item in fields(format.Options)]


def check_choices(options: Any, what: str) -> None:
    """Refuse values that are none of an option's choices.

    Raises:
        UsageError: naming the choices.
    """
    for item in fields(options):
        choices, value = item.metadata.get("choices"), getattr(options, item.name)
        if choices and value is not None and value not in choices:
            raise UsageError(f"There is no {item.name} {value!r} for {what}. Choose {' or '.join(choices)}.")
