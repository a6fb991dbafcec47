"""What is disturbed, and how: compress and export of a small model, at every step of theirs that touches the disk.

A step is: to open a file for writing, the middle of writing a tensor, to make, rename or remove a file or folder.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import MambaConfig, MambaForCausalLM

import ssmc
from ssmc.runtime.models.checkpoints import writing
from tests.support.families import roughen, with_tokenizer
from tests.support.ranks import BROKEN, REFUSED, child

OPTIONS = {"pattern": "column+channel", "sparsity": 0.5, "nsamples": 2, "seqlen": 32, "round_channels": 8}
WEIGHTS = "model.safetensors"
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


@dataclass(frozen=True)
class Disturbance:
    """What happens at a step.

    Attributes:
        act: does it, in the process that is disturbed.
        says: what stands in the sentence of a run that ends by it.
        mend: afterwards, before the next run.
        resume: whether the next run may go on there: not where it reads files that are new.
    """

    act: Callable[[], None]
    says: str = ""
    mend: Callable[[], object] = lambda: None
    resume: bool = True


@dataclass(frozen=True)
class Subject:
    """A command that is disturbed.

    Attributes:
        name: of the command.
        work: carries it out with options of its own: `resume`, `force`, `out`.
        reads: the folder it reads.
        out: what it writes.
    """

    name: str
    work: Callable[..., object]
    reads: Path
    out: Path

    def undisturbed(self, keep: Path | None = None) -> tuple[dict[str, bytes], int]:
        """What it writes, and in how many steps; a copy is kept in a folder."""

        def count() -> int:
            trap = Trap(self.out.parent, None, lambda: None)
            self.work()
            return trap.seen

        code, said = child(count)
        assert code == 0, said
        found = content(self.out)
        if keep is not None:
            shutil.copytree(self.out, keep)
        self.clear()
        return found, int(said)

    def disturbed(self, step: int, how: Disturbance, wanted: dict[str, bytes]) -> str | None:
        """Disturb it at a step and run it again; what is wrong then."""

        def trapped() -> None:
            Trap(self.out.parent, step, how.act)
            self.work()

        code, said = child(trapped)
        how.mend()
        wrong = self._wrong(code, said, how, wanted)
        self.clear()
        return wrong

    def _wrong(self, code: int, said: str, how: Disturbance, wanted: dict[str, bytes]) -> str | None:
        if code == BROKEN:
            return said
        if self.out.exists() and content(self.out) != wanted:
            return "something half done looks finished"
        if code == REFUSED and how.says not in said:
            return f"it does not say what was wrong: {said}"
        there = self.out.exists()
        if code == 0 and not there:
            return "nothing was written, and nothing said"
        if not there or self.beside():  # what is whole already is replaced
            code, said = child(lambda: self.work(resume=how.resume and not there, force=there))
            if code != 0:
                return f"the next run ended in {code}: {said}"
        return None if content(self.out) == wanted and not self.beside() else "other bytes, or leftovers"

    def beside(self) -> list[str]:
        """What stands beside the result."""
        return [path.name for path in self.out.parent.iterdir() if path != self.out]

    def clear(self) -> None:
        for path in self.out.parent.iterdir():
            shutil.rmtree(path)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def make_model(folder: Path) -> Path:
    sizes = {"vocab_size": 4096, "hidden_size": 16, "state_size": 8, "num_hidden_layers": 3, "time_step_rank": 2}
    roughen(MambaForCausalLM(MambaConfig(**sizes))).to(torch.bfloat16).save_pretrained(folder)
    return with_tokenizer(folder)


def subjects(root: Path) -> Iterator[tuple[Subject, dict[str, bytes], int]]:
    """Each command, what it writes undisturbed, and in how many steps."""
    model, text, pruned = make_model(root / "model"), root / "text.jsonl", root / "pruned"
    places = {name: root / name for name in ("compress", "export")}
    for place in places.values():
        place.mkdir()

    def compress(out: Path = places["compress"] / "out", **how: bool) -> None:
        ssmc.compress(model, calib=text, out=out, command="-", **how, **OPTIONS)

    def export(out: Path = places["export"] / "out", resume: bool = False, force: bool = False) -> None:
        ssmc.export(pruned, out=out, force=force)

    first = Subject("compress", compress, model, places["compress"] / "out")
    yield first, *first.undisturbed(pruned)
    second = Subject("export", export, pruned, places["export"] / "out")
    yield second, *second.undisturbed()
