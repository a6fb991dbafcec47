"""Disturb runs: kill them at every step, take their disk away, change the model under their hands.

    python -m tests.faults.run                    every step of compress and export, an hour
    python -m tests.faults.run --part 2/3         every third of them, from the second on
    python -m tests.faults.run --cases kill crowd some kinds of faults
    python -m tests.faults.run --few 4            some steps, evenly spread: what `make test` runs

After each disturbance nothing may look finished that is not, a run that ends says why, and the next run ends in the
bytes of a run that was not disturbed, with nothing left beside them.

`full` lets a step fail as on a full disk, `tmpfs` fills a small one, so that what is written next fails, and `readonly`
makes it read-only. For that the run goes to a namespace of its own, where it may mount one; `slow` needs root.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
import transformers

import ssmc
from ssmc.runtime.models.checkpoints import load_checkpoint
from tests.faults import disks
from tests.faults.subjects import OPTIONS, WEIGHTS, Disturbance, Subject, content, make_model, subjects
from tests.support.ranks import REFUSED, child, children, in_ranks

Found = dict[str, object]  # how many were tried, of how many, and what went wrong

ON_DISK = ("kill", "full", "tmpfs", "readonly")  # at every step
ON_MODEL = ("vanishes", "shorter", "replaced", "overwritten")  # at some steps
AT_ONCE = ("crowd", "processes", "slow")
MOUNTED = ("tmpfs", "readonly")
SOME = 12  # steps at which a model file is changed
CROWD, ROUNDS = 4, 5  # processes that start together, and how often


def kill() -> None:
    os.kill(os.getpid(), 9)


def disturbances(root: Path) -> dict[str, Callable[[Subject], Disturbance]]:
    """All that happen at a step, by their names; `root` is the disk that all is on."""
    ways = {
        "vanishes": lambda path: path.unlink(),
        "shorter": lambda path: os.truncate(path, 1000),
        "replaced": lambda path: os.replace(shutil.copy(path, path.with_suffix(".new")), path),
        "overwritten": lambda path: path.write_bytes(path.read_bytes()[:-4000] + bytes(4000)),
    }
    found: dict[str, Callable[[Subject], Disturbance]] = {
        "kill": lambda subject: Disturbance(kill),
        "full": lambda subject: Disturbance(disks.no_space, "no space"),
        "tmpfs": lambda subject: disks.full(root),
        "readonly": lambda subject: disks.readonly(root),
    }
    return found | {name: partial(change, way) for name, way in ways.items()}


def change(way: Callable[[Path], object], subject: Subject) -> Disturbance:
    """Change the file that holds the weights; afterwards it is as it was."""
    path = subject.reads / WEIGHTS
    whole = path.read_bytes()
    return Disturbance(lambda: way(path), WEIGHTS, lambda: path.write_bytes(whole), resume=False)


def steps_to_try(count: int, few: int | None) -> list[int]:
    """All of them, or some, evenly spread, and the one where all is written and has not its name yet."""
    if few is None or few >= count:
        return list(range(1, count + 1))
    return [*(round((i + 0.5) * count / few) for i in range(few)), count - 2]


def at_steps(cases: list[str], few: int | None, part: tuple[int, int]) -> Iterator[tuple[str, Found]]:
    """Disturb each command at its steps.

    Args:
        cases: which disturbances.
        few: steps of compress, and one of export; None: all.
        part: which of them, and out of how many: (2, 3) takes the second, the fifth and so on.
    """
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(disks.small_disk(root, any(case in MOUNTED for case in cases)))
        for subject, wanted, count in subjects(root):
            for case in cases:
                least = few if subject.name == "compress" else few and 1
                steps = steps_to_try(count, least or (SOME if case in ON_MODEL else None))
                steps = steps[part[0] - 1 :: part[1]]
                how = disturbances(root)[case](subject)
                tries = ((step, subject.disturbed(step, how, wanted)) for step in steps)
                wrong = [f"step {step}: {problem}" for step, problem in tries if problem]
                yield f"{subject.name}, {case}", {"tried": len(steps), "of": count, "wrong": wrong}


def crowd() -> Iterator[tuple[str, Found]]:
    """Runs that start together with one --out: one writes it, the others say so, and nothing is left of them."""
    with tempfile.TemporaryDirectory() as folder:
        for subject, wanted, _ in subjects(Path(folder)):
            wrong = []
            for force in (False, True) * ROUNDS:
                for code, said in children([partial(subject.work, force=force)] * CROWD):
                    if code and not (code == REFUSED and ("Another run" in said or "exists already" in said)):
                        wrong.append(f"{code}: {said}")
                if not subject.out.is_dir() or content(subject.out) != wanted or subject.beside():
                    wrong.append(f"other bytes, or leftovers: {subject.beside()}")
                if force:
                    subject.clear()
            yield f"{subject.name}, {CROWD} runs at once", {"tried": 2 * ROUNDS, "wrong": wrong}


def slow() -> Iterator[tuple[str, Found]]:
    """A disk of some writes a second, each of them at once."""
    with tempfile.TemporaryDirectory() as folder:
        for subject, wanted, _ in subjects(Path(folder)):
            try:
                with disks.slow_disk(subject.out.parent):
                    began = time.monotonic()
                    code, said = child(subject.work)
                    seconds = time.monotonic() - began
                    wrong = [] if code == 0 and content(subject.out) == wanted else [f"{code}: {said}, or other bytes"]
            except (OSError, subprocess.CalledProcessError) as error:
                yield f"{subject.name}, slow", {"tried": 0, "wrong": [], "why": str(error)}
                continue
            yield f"{subject.name}, slow", {"tried": 1, "seconds": round(seconds, 1), "wrong": wrong}


def together(count: int) -> list[str]:
    """Let processes share the samples; what is wrong with what they write."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model, text = make_model(root / "model"), root / "text.jsonl"

        def compress(out: Path) -> None:
            ssmc.compress(model, calib=text, out=out, command="-", **OPTIONS | {"nsamples": 5})

        code, said = child(lambda: compress(root / "alone"))
        assert code == 0, said
        for out in (root / "shared", root / "again"):
            if not in_ranks(count, partial(compress, out)):
                return ["a process failed"]
        alone, shared = (json.loads((root / name / "ssmc.json").read_text())["layers"] for name in ("alone", "shared"))
        wrong = [] if content(root / "shared") == content(root / "again") else ["other bytes the second time"]
        for one, other in zip(alone, shared, strict=True):
            if (one["kept"], one["kept_channels"]) != (other["kept"], other["kept_channels"]):
                wrong.append("other masks than one process")
            if abs(one["error"] - other["error"]) > 1e-5 * abs(one["error"]):
                wrong.append(f"an error of {other['error']}, not {one['error']}")
        return wrong


def tried(asked: argparse.Namespace) -> Iterator[tuple[str, Found]]:
    """What was asked for, one result after the other."""
    number, parts = map(int, asked.part.split("/"))
    if cases := [case for case in asked.cases if case not in AT_ONCE]:
        yield from at_steps(cases, asked.few, (number, parts))
    if "crowd" in asked.cases:
        yield from crowd()
    if "slow" in asked.cases:
        yield from slow()
    if "processes" in asked.cases:
        for count in (2,) if asked.few else (2, 3, 5):
            yield f"{count} processes", {"tried": 1, "wrong": together(count)}


def record(path: Path, name: str, found: Found) -> None:
    """Write a result to a file, added to that of other parts."""
    known = json.loads(path.read_text()) if path.is_file() else {}
    before = known.get(name, {"tried": 0, "wrong": []})
    added = {"tried": before["tried"] + found["tried"], "wrong": before["wrong"] + found["wrong"]}
    path.write_text(json.dumps(known | {name: found | added}, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Try what was asked for, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [*ON_DISK, *ON_MODEL, *AT_ONCE]
    parser.add_argument("--cases", nargs="+", choices=every, default=every)
    parser.add_argument("--few", type=int, help="so many steps of compress only, and one of export")
    parser.add_argument("--part", default="1/1", help="which steps of all that would be tried: 2/3 is every third")
    parser.add_argument("--out", type=Path, help="JSON file; the counts of parts are added up in it")
    parser.add_argument("--may-mount", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if any(case in MOUNTED for case in asked.cases) and not asked.may_mount:
        root = [] if os.geteuid() == 0 else ["--map-root-user"]
        command = [sys.executable, "-m", "tests.faults.run", *sys.argv[1:], "--may-mount"]
        os.execvp("unshare", ["unshare", *root, "--mount", *command])
    torch.set_num_threads(1)  # children of a process with threads that computed would wait for those threads
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    load_checkpoint("tiny", lazy=True)  # imports what children need
    everything = {}
    for name, found in tried(asked):
        everything[name] = found
        print(f"{name}: {found['tried']} tried, {len(found['wrong'])} wrong", file=sys.stderr, flush=True)
        for problem in found["wrong"]:
            print(f"  {problem}", file=sys.stderr, flush=True)
        if asked.out is not None:
            record(asked.out, name, found)
    print(json.dumps(everything, indent=1))
    sys.exit(any(found["wrong"] for found in everything.values()))


if __name__ == "__main__":
    main()
