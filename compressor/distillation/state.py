"""An interrupted distillation: the file that holds how far it came, beside the folder that will be written."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ssmc.runtime.errors import UsageError
from ssmc.runtime.files import replaced_file

SUFFIX = ".distilling"


@dataclass(frozen=True)
class StateFile:
    """Where a distillation keeps its state.

    Attributes:
        path: the file.
        resume: whether to go on with what is there.
    """

    path: Path
    resume: bool = False

    @classmethod
    def beside(cls, out: Path, resume: bool) -> StateFile:
        """That of the run that will write the folder `out`."""
        return cls(out.with_name(out.name + SUFFIX), resume)

    def check(self) -> None:
        """Refuse, before any work, what would be lost or cannot be.

        Raises:
            UsageError: there is a state that nobody asked for, or none where one was.
        """
        if self.resume and not self.path.is_file():
            raise UsageError(
                f"There is no interrupted distillation to go on with: {self.path} does not exist. Leave out --resume."
            )
        if not self.resume and self.path.exists():
            raise UsageError(
                f"{self.path} holds an interrupted distillation. Go on with it by --resume, or remove the file "
                "and begin anew."
            )

    def load(self, run: str) -> Mapping[str, Any] | None:
        """What was saved last by the run with this fingerprint; None: it begins.

        Raises:
            UsageError: it was another run, or the file is damaged.
        """
        if not self.resume:
            return None
        try:
            content = torch.load(self.path, weights_only=True)
            same, state = content["run"] == run, content["state"]
        except Exception as error:  # torch raises whatever the bytes lead it to
            raise UsageError(
                f"{self.path} is not the state of a distillation, or it is damaged. Remove it and begin anew."
            ) from error
        if not same:
            raise UsageError(
                f"{self.path} belongs to a distillation with other options, another model, text or version of ssmc. "
                "Give the options it was begun with, or remove the file to begin anew."
            )
        return state

    def save(self, run: str, state: Mapping[str, Any]) -> None:
        """Replace what was saved before; an interrupt leaves the one or the other."""
        with replaced_file(self.path) as file:
            torch.save({"run": run, "state": dict(state)}, file)

    def remove(self) -> None:
        """The result is written."""
        self.path.unlink(missing_ok=True)


def fingerprint(tensors: Iterable[torch.Tensor], *told: object) -> str:
    """Tells runs apart: SHA-256 of numbers, and of what else a run was told."""
    digest = hashlib.sha256(repr(told).encode())
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
