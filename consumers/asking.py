"""Ask one consumer: a process in its own environment, with a limit of time, whose end is an error and no more."""

from __future__ import annotations

import json
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssmc.runtime.errors import SsmcError

SCRIPTS = Path(__file__).parent / "ask"
TELLING = ("GGML_ASSERT", "Error", "error", " E ")  # parts of the lines of a log that tell what went wrong


class ConsumerError(SsmcError):
    """A consumer could not load or run an export."""


class Consumer:
    """An export that a consumer has loaded; use it in a `with` block."""

    def __init__(self, python: Path, script: str, folder: Path, *, threads: int = 1, limit: float = 300):
        """Start it.

        Args:
            python: the interpreter of its environment.
            script: a name in `ask/`.
            folder: of the export.
            threads: that compute.
            limit: seconds for loading, and for each answer.

        Raises:
            ConsumerError: it cannot load the export.
        """
        self.limit, self._folder = limit, str(Path(folder).resolve())
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the process does)
        command = [str(python), str(SCRIPTS / script), str(Path(folder).resolve()), str(threads)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, cwd=tempfile.gettempdir()
        )
        try:
            told = self._answer()
        except BaseException:
            self.close()
            raise
        self.values: str = told["values"]
        self.versions: dict[str, str] = told["versions"]

    def __enter__(self) -> Consumer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        self._log.close()

    def logits(self, tokens: Sequence[int], lengths: Sequence[int], first: int) -> tuple[np.ndarray, np.ndarray]:
        """What the consumer computes of what follows.

        Args:
            tokens: L ids.
            lengths: of prompts read at once, from the first token on.
            first: tokens of the prompt behind which the others are read one by one.

        Returns:
            Logits or log probabilities, see `values`: behind each prompt (len(lengths), V) and each single token
            (L - first, V).

        Raises:
            ConsumerError: it fails.
        """
        with tempfile.TemporaryDirectory() as name:
            path = Path(name) / "logits.npz"
            self._ask("logits", tokens=list(tokens), lengths=list(lengths), first=first, path=str(path))
            with np.load(path) as found:
                return found["whole"], found["stepped"]

    def time(self, tokens: Sequence[int], new: int, *, processor: bool = False) -> dict[str, float]:
        """Seconds to read the tokens at once ("prefill") and of one of `new` more ("decode"); or of processor time."""
        return self._ask("time", tokens=list(tokens), new=new, processor=processor)

    def _ask(self, call: str, **arguments: Any) -> dict[str, Any]:
        try:
            self._process.stdin.write(json.dumps({"call": call, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError) as error:
            raise self._ended() from error
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        late = threading.Event()

        def stop() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(self.limit, stop)
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if late.is_set():
            raise ConsumerError(f"no answer within {self.limit:g} s")
        if not line:
            raise self._ended()
        reply = json.loads(line)
        if "error" in reply:
            raise ConsumerError(self._sentence(reply["error"]))
        return reply

    def _ended(self) -> ConsumerError:
        """What is to be said of a process that is no more: the line of its log that tells why."""
        self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        telling = [line for line in lines if any(word in line for word in TELLING)]
        reason = (telling or lines)[-1:] or [f"ended with code {self._process.returncode}"]
        return ConsumerError(self._sentence(reason[0]))

    def _sentence(self, text: str) -> str:
        """A message in one line, without where the export lies on this machine."""
        return " ".join(text.replace(self._folder, "the export").split())[:300]
