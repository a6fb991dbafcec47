"""Disturb runs at every step that touches the disk: kill them, fill the disk, change the model under their hands.

    python -m tests.faults.run                    every step of compress and export, half an hour
    python -m tests.faults.run --part 2/3         every third of them, from the second on
    python -m tests.faults.run --few 4            some steps, evenly spread: what `make test` runs

A step is: to open a file for writing, the middle of writing a tensor, to make, rename or remove a file or folder. After
each disturbance nothing may look finished, and the next run ends in the bytes of a run that was not disturbed.

`full` lets the step itself fail as on a full disk, `tmpfs` fills a small one, so that what is written next fails; for
that the run goes to a namespace of its own, where it may mount one.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import transformers
from transformers import MambaConfig, MambaForCausalLM

import ssmc
from ssmc.compressor.streaming import Result
from ssmc.runtime.models.checkpoints import load_checkpoint, writing
from tests.support.families import roughen, with_tokenizer
from tests.support.ranks import BROKEN, REFUSED, child, in_ranks

OPTIONS = {"pattern": "column+channel", "sparsity": 0.5, "nsamples": 2, "seqlen": 32, "round_channels": 8}
KINDS = ("kill", "full", "tmpfs")
FILLER, DISK = "filler", 16 << 20  # the file that fills a disk of so many bytes
ON_FOLDERS = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")


class Trap:
    """Counts the steps of this process that touch a folder, and does something at one of them."""

    def __init__(self, root: Path, at: int | None, act: Callable[[], None]):
        self.root, self.at, self.act, self.seen = str(root), at, act, 0
        sys.addaudithook(self.hook)
        whole = writing._write

        def half_first(path: Path, offset: int, tensor: torch.Tensor) -> None:
            flat = tensor.reshape(-1)
            if len(flat) > 1:
                whole(path, offset, flat[: len(flat) // 2])
                self.step()
            whole(path, offset, tensor)

        writing._write = half_first

    def hook(self, event: str, args: tuple) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in ON_FOLDERS) and self.root in os.fsdecode(args[0] if args[0] is not None else ""):
            self.step()

    def step(self) -> None:
        self.seen += 1
        if self.seen == self.at:
            self.act()


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fill_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fill_tmpfs(root: Path) -> None:
    with contextlib.suppress(OSError), (root / FILLER).open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def make_model(folder: Path) -> Path:
    sizes = {"vocab_size": 4096, "hidden_size": 16, "state_size": 8, "num_hidden_layers": 3, "time_step_rank": 2}
    roughen(MambaForCausalLM(MambaConfig(**sizes))).to(torch.bfloat16).save_pretrained(folder)
    return with_tokenizer(folder)


class Subject:
    """A command that is disturbed."""

    def __init__(self, name: str, work: Callable[[bool], object], out: Path, keep: Path | None = None):
        self.name, self.work, self.out, self.keep = name, work, out, keep

    def undisturbed(self) -> tuple[dict[str, bytes], int]:
        """What it writes, and in how many steps."""

        def count() -> int:
            trap = Trap(self.out.parent, None, kill)
            self.work(False)
            return trap.seen

        code, said = child(count)
        assert code == 0, said
        found = content(self.out)
        if self.keep is not None:
            shutil.copytree(self.out, self.keep)
        self.clear()
        return found, int(said)

    def disturbed(self, step: int, act: Callable[[], None], wanted: dict[str, bytes]) -> str | None:
        """Disturb it at a step and run it again; what is wrong then."""

        def trapped() -> None:
            Trap(self.out.parent, step, act)
            self.work(False)

        code, said = child(trapped)
        if code == BROKEN:
            return said
        if self.out.exists() and content(self.out) != wanted:
            return "something half done looks finished"
        if act is not kill and code == REFUSED and "space" not in said:
            return f"it does not say what was wrong: {said}"
        (self.out.parent.parent / FILLER).unlink(missing_ok=True)
        if not self.out.exists():
            code, said = child(lambda: self.work(True))
            if code != 0:
                return f"the next run ended in {code}: {said}"
        wrong = None if content(self.out) == wanted else "other bytes"
        self.clear()
        return wrong

    def clear(self) -> None:
        for path in self.out.parent.iterdir():
            if path.name.startswith(".") or path == self.out:
                shutil.rmtree(path)


def subjects(root: Path) -> Iterator[Subject]:
    model, text = make_model(root / "model"), root / "text.jsonl"
    places = {name: root / name for name in ("compress", "export")}
    for place in places.values():
        place.mkdir()

    def compress(again: bool) -> None:
        ssmc.compress(model, calib=text, out=places["compress"] / "out", resume=again, command="-", **OPTIONS)

    pruned = root / "pruned"
    yield Subject("compress", compress, places["compress"] / "out", pruned)
    yield Subject("export", lambda again: ssmc.export(pruned, out=places["export"] / "out"), places["export"] / "out")


def steps_to_try(count: int, few: int | None) -> list[int]:
    """All of them, or some, evenly spread, and the one where all is written and has not its name yet."""
    if few is None or few >= count:
        return list(range(1, count + 1))
    return [*(round((i + 0.5) * count / few) for i in range(few)), count - 2]


def disturb(few: int | None, kinds: list[str], part: tuple[int, int]) -> dict[str, list[str]]:
    """Try it; what went wrong, by command and kind.

    Args:
        few: steps of each command; None: all.
        kinds: of disturbances.
        part: which of them, and out of how many: (2, 3) takes the second, the fifth and so on.
    """
    found = {}
    with tempfile.TemporaryDirectory() as folder, small_disk(Path(folder), "tmpfs" in kinds):
        acts = {"kill": kill, "full": fill_disk, "tmpfs": partial(fill_tmpfs, Path(folder))}
        for subject in subjects(Path(folder)):
            wanted, count = subject.undisturbed()
            for kind in kinds:
                wrong, steps = [], steps_to_try(count, few if subject.keep else few and 1)[part[0] - 1 :: part[1]]
                for step in steps:
                    if problem := subject.disturbed(step, acts[kind], wanted):
                        wrong.append(f"step {step} of {count}: {problem}")
                        print(wrong[-1], file=sys.stderr, flush=True)
                found[f"{subject.name}, {kind}"] = wrong
                tried = f"{len(steps)} of {count} steps"
                print(f"{subject.name}, {kind}: {tried}, {len(wrong)} wrong", file=sys.stderr, flush=True)
    return found


@contextlib.contextmanager
def small_disk(folder: Path, wanted: bool) -> Iterator[None]:
    """Inside the block a folder is a disk of its own with room for what is written there, and little more."""
    if not wanted:
        yield
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "none", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def change_model(how: Callable[[Path], None]) -> tuple[int, str, bool]:
    """Change the file of a model while it is read: exit code, what was said, whether there is a result."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = make_model(root / "model")

        def work() -> None:
            finished = Result.finished

            def then(self: Result, job: object) -> None:
                finished(self, job)
                how(model / "model.safetensors")

            Result.finished = then
            ssmc.compress(model, calib=root / "text.jsonl", out=root / "out", **OPTIONS)

        code, said = child(work)
        return code, said, (root / "out").exists()


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


CHANGES: dict[str, Callable[[Path], None]] = {
    "vanishes": lambda path: path.unlink(missing_ok=True),
    "gets shorter": lambda path: os.truncate(path, 1000),
    "is replaced": lambda path: os.replace(shutil.copy(path, path.with_suffix(".new")), path),
}


def main() -> None:
    """Try all or some, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--few", type=int, help="so many steps of each command only, and one change of the model")
    parser.add_argument("--part", default="1/1", help="which steps of all that would be tried: 2/3 is every third")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--may-mount", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if "tmpfs" in asked.kinds and not asked.may_mount:
        command = [sys.executable, "-m", "tests.faults.run", *sys.argv[1:], "--may-mount"]
        os.execvp("unshare", ["unshare", "--map-root-user", "--mount", *command])
    torch.set_num_threads(1)  # children of a process with threads that computed would wait for those threads
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    load_checkpoint("tiny", lazy=True)  # imports what children need
    number, parts = map(int, asked.part.split("/"))
    found = disturb(asked.few, asked.kinds, (number, parts))
    for name, how in list(CHANGES.items())[: 1 if asked.few else None]:
        code, said, there = change_model(how)
        fine = code == REFUSED and not there and "model.safetensors" in said
        found[f"the model {name}"] = [] if fine else [f"{code}: {said}"]
    for count in (2,) if asked.few else (2, 3, 5):
        found[f"{count} processes"] = together(count)
    print(json.dumps(found, indent=1))
    sys.exit(any(found.values()))


if __name__ == "__main__":
    main()
