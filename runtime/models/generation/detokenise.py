"""Text from tokens that come one by one: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

from ssmc.runtime.errors import CheckpointError


class TextStream:
    """Decode tokens as they come; text appears as soon as its characters are whole."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = ()):
        """Begin after a prompt.

        Args:
            tokenizer: transformers' tokenizer.
            prompt: the tokens before, which say whether a leading space belongs to the text.

        Raises:
            CheckpointError: the tokenizer is not one of the tokenizers library.
        """
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is None:
            raise CheckpointError(
                f"The tokenizer ({type(tokenizer).__name__}) cannot decode token by token. Save it once as "
                "tokenizer.json and name that with --tokenizer."
            )
        self._stream = DecodeStream(ids=list(prompt), skip_special_tokens=True)
        self._held: list[int] = []  # tokens that have not become text yet

    def push(self, token: int) -> str:
        """The text that a token completes, often its own, sometimes none."""
        self._held.append(token)
        text = self._stream.step(self._backend, token)
        if text is None:
            return ""
        self._held = []
        return text

    def end(self) -> str:
        """What remains: characters of which the last bytes never came, as replacement characters."""
        held, self._held = self._held, []
        return self._backend.decode(held, skip_special_tokens=True) if held else ""


class StopFilter:
    """Let text through up to the first stop string, holding back what could be the beginning of one."""

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The part of everything so far that is certain to be no part of a stop string and was not given yet."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def end(self) -> str:
        """What was held back and is no stop string after all."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
