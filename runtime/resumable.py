"""A result that is made in steps and survives its process: what is finished is on disk, and the next run goes on there.

    .NAME.partial/
        journal.jsonl   what the run is, then a line for each finished step
        result/         the result, as far as it is there

The folder is renamed to its name only when all of it is there. A line is written when what it speaks of is written. A
process that is killed takes nothing back; a machine that loses its power may forget what was not forced to the disk, so
lines before the last "on disk" count only as long as the machine was not started anew.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssmc.runtime.errors import CalibrationError, OutputError, UsageError, VerificationError
from ssmc.runtime.files import disk_errors, expand, publish, refuse_existing, resolve, sync_tree
from ssmc.runtime.locks import locked, remove_leftovers

JOURNAL, RESULT = "journal.jsonl", "result"
SYNC = 5.0  # seconds between two times that everything is forced to the disk
WORTH = 60.0  # seconds of work that stay even if the user ended the run
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_FINAL = (UsageError, CalibrationError, VerificationError)  # the same run would end in them again


@dataclass
class Resumable:
    """A result on its way.

    Attributes:
        folder: of the result.
        beside: a folder for what is needed on the way.
        about: what the run that began it said of itself and need not be the same, by name.
        steps: what was noted of the finished steps, by their numbers.
        notes: sentences for the user.
    """

    folder: Path
    beside: Path
    about: Mapping[str, Any] = field(default_factory=dict)
    steps: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _synced: float = 0.0

    def finished(self, number: int, note: Mapping[str, Any]) -> None:
        """Note that a step is over; its files are written."""
        self.steps[number] = note
        now = time.monotonic()
        entry: dict[str, Any] = {"step": number, "note": note}
        if now - self._synced >= SYNC:
            sync_tree(self.beside)
            self._synced, entry["on_disk"] = now, True
        self._write(entry, sync="on_disk" in entry)

    def _write(self, entry: Mapping[str, Any], sync: bool) -> None:
        with (self.beside / JOURNAL).open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(entry) + "\n")
        if sync:
            sync_tree(self.beside)


@contextlib.contextmanager
def resumable(
    path: Path, run: Mapping[str, Any], about: Mapping[str, Any], *, force: bool, marker: str, resume: bool
) -> Iterator[Resumable]:
    """Fill a directory in steps; it takes its name when the block ends without error.

    Args:
        path: as for `new_directory`, and `force` and `marker`.
        run: what makes the result what it is; only a run that is the same goes on where another one ended.
        about: what else is to be kept for the run that goes on.
        force: replace an earlier result.
        marker: name of the file that says a directory is one of ours.
        resume: go on where an earlier run ended; otherwise what it left is removed.

    Raises:
        OutputError: see `new_directory`; or another run is at it.
        UsageError: what is there is of another run.
    """
    path = expand(path)
    refuse_existing(path, force=force, marker=marker)
    target = resolve(path)
    beside = target.with_name(f".{target.name}.partial")
    parents = [parent for parent in target.parents if not parent.exists()]  # the deepest first
    notes = remove_leftovers(target, but=beside if resume else None)
    with disk_errors(path):
        beside.mkdir(parents=True, exist_ok=True)
    with locked(beside) as free:
        if not free:
            raise OutputError(
                f"Another run is writing {path} right now (in {beside.name}). Wait for it, or choose another place "
                "with --out."
            )
        began = time.monotonic()
        work = None
        try:
            with disk_errors(path, only_inside=beside):
                work = _begin(beside, dict(run), dict(about), resume, path)
                work.notes[:0] = notes
                yield work
            with disk_errors(path):
                publish(work.folder, target, path, force=force, marker=marker)
        except BaseException as error:
            if work is not None and work.steps and _stays(error, time.monotonic() - began):
                error.add_note(
                    f"The {len(work.steps)} layers that were finished are kept in {beside.name}: the same "
                    "command with --resume goes on there."
                )
            elif work is not None:
                shutil.rmtree(beside, ignore_errors=True)
                for parent in parents:
                    with contextlib.suppress(OSError):
                        parent.rmdir()
            raise
        with contextlib.suppress(OSError):  # the result is in place: what remains is litter, which the next run removes
            shutil.rmtree(beside, ignore_errors=True)


def _stays(error: BaseException, seconds: float) -> bool:
    """Whether what was done is kept: not after what would come again, nor after a moment that the user ended."""
    return not isinstance(error, _FINAL) and (isinstance(error, Exception) or seconds > WORTH)


def _begin(beside: Path, run: dict[str, Any], about: dict[str, Any], resume: bool, path: Path) -> Resumable:
    """Read the journal of an earlier run, or begin one."""
    journal, folder = beside / JOURNAL, beside / RESULT
    lines = _lines(journal) if resume and folder.is_dir() else []
    if not lines:
        _clear(beside)
        folder.mkdir()
        work = Resumable(folder, beside, about, _synced=time.monotonic())
        work._write({"run": run, "about": about, "boot": _boot()}, sync=True)
        if resume:
            work.notes.append(f"There was nothing to resume beside {path}: the run began anew.")
        return work
    head, *entries = lines
    if different := [key for key in run if head["run"].get(key) != json.loads(json.dumps(run[key]))]:
        raise UsageError(
            f"What is there to resume for {path} was begun with another {' and '.join(different)}. Give the options "
            "of that run, or leave --resume out to begin anew."
        )
    if head["boot"] is None or head["boot"] != _boot():
        last = max((number for number, entry in enumerate(entries) if entry.get("on_disk")), default=-1)
        entries = entries[: last + 1]
    steps = {entry["step"]: entry["note"] for entry in entries}
    folder.mkdir(exist_ok=True)
    work = Resumable(folder, beside, head["about"], steps, _synced=time.monotonic())
    _rewrite(journal, [head | {"boot": _boot()}, *entries])
    work.notes.append(f"Resumed after {len(steps)} finished layers.")
    return work


def _lines(journal: Path) -> list[dict[str, Any]]:
    """The lines of a journal up to the first that was not written whole; none if it has no first one."""
    found = []
    try:
        for line in journal.read_bytes().split(b"\n")[:-1]:
            found.append(json.loads(line))
    except FileNotFoundError:
        return []
    except ValueError:
        pass
    return found if found and {"run", "about", "boot"} <= found[0].keys() else []


def _rewrite(journal: Path, lines: list[dict[str, Any]]) -> None:
    new = journal.with_suffix(".new")
    new.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8", newline="\n")
    new.replace(journal)


def _clear(beside: Path) -> None:
    for item in beside.iterdir():
        shutil.rmtree(item) if item.is_dir() else item.unlink()


def _boot() -> str | None:
    """Which start of the machine this is; None where the system does not say."""
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return None
