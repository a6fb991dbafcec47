"""Ask llama.cpp: it runs in another process, whose end is an error here and not the end of everything."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ssmc.runtime.errors import CheckpointError

PACKAGE = "xllamacpp"
_WORKER = "ssmc.runtime.models.llama_cpp.worker"
_TELLING = ("GGML_ASSERT", " E ", "error", "Error")  # parts of the lines of its log that tell what went wrong


def is_installed() -> bool:
    """Whether llama.cpp can be asked: the package xllamacpp is there."""
    return find_spec(PACKAGE) is not None


class LlamaCpp:
    """A GGUF file that llama.cpp has loaded on the CPU; use it in a `with` block, or close it.

    Log probabilities and times are llama.cpp's own; texts are given as token ids.
    """

    def __init__(self, path: str | Path, *, context: int = 1024, threads: int = 1):
        """Load a file.

        Args:
            path: of the file.
            context: tokens of a sequence at most.
            threads: that compute.

        Raises:
            CheckpointError: llama.cpp cannot load it.
        """
        self.path = Path(path)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the process does)
        command = [sys.executable, "-m", _WORKER, str(self.path.resolve()), str(context), str(threads)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, cwd=tempfile.gettempdir()
        )
        try:
            self.memory: dict[str, int] = self._answer()  # resident bytes before and after loading
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def log_probs(self, tokens: Sequence[int], vocab_size: int, *, cached: bool = False) -> np.ndarray:
        """Log probabilities (V,) of what follows some tokens.

        Args:
            tokens: read at once, from a fresh state.
            vocab_size: V.
            cached: go on from the tokens of the last call where these begin with them.
        """
        return self._ask("log_probs", tokens=list(tokens), vocab_size=vocab_size, cached=cached)

    def score(self, tokens: Sequence[int], first: int = 1) -> tuple[list[float], list[bool]]:
        """Log probabilities of tokens number `first` and after, given those before, and whether each was likeliest.

        The first is scored behind a prompt that is read at once, the others a token at a time.
        """
        values, likeliest = self._ask("score", tokens=list(tokens), first=first)
        return values, likeliest

    def time(self, tokens: Sequence[int], new: int) -> dict[str, float]:
        """Seconds to read the tokens ("read") and seconds of one more token ("token"), by llama.cpp's own clock."""
        return self._ask("time", tokens=list(tokens), new=new)

    def count_tokens(self, text: str) -> int:
        """How many tokens its own tokenizer makes of a text."""
        return self._ask("tokenize", text=text)

    def continue_text(self, text: str, new: int) -> str:
        """The greedy continuation of a text."""
        return self._ask("continued", text=text, new=new)

    def resident_bytes(self) -> int:
        """What the process holds now."""
        return self._ask("memory")["resident"]

    def _ask(self, call: str, **arguments: Any) -> Any:
        try:
            self._process.stdin.write(json.dumps({"call": call, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError) as error:
            raise self._ended() from error
        return self._answer()

    def _answer(self) -> Any:
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        reply = json.loads(line)
        if "error" in reply:
            raise CheckpointError(f"llama.cpp cannot run {self.path}: {reply['error']}. Export it again.")
        if reply["bytes"]:
            return np.frombuffer(self._process.stdout.read(reply["bytes"]), np.float32)
        return reply["answer"]

    def _ended(self) -> CheckpointError:
        """What is to be said of a process that is no more: the line of its log that tells why."""
        self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        telling = [line for line in lines if any(word in line for word in _TELLING)]
        reason = (telling or lines[-1:] or [f"it ended with code {self._process.returncode}"])[0].strip()
        return CheckpointError(f"llama.cpp cannot run {self.path} ({reason[:300].rstrip('.')}). Export it again.")
