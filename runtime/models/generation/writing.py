"""Let a session write: tokens and text as they come."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ssmc.runtime.errors import UsageError
from ssmc.runtime.models.generation.detokenise import StopFilter, TextStream
from ssmc.runtime.models.generation.opening import LoadedSession, open_session, require_tokenizer
from ssmc.runtime.models.generation.sampling import Chooser, Sampling
from ssmc.runtime.models.generation.session import Session, as_tokens, pad_left, step_by_step
from ssmc.runtime.models.generation.torch_session import TorchSession

MAX_NEW_TOKENS = 128


def stream_tokens(
    session: Session,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    stop_tokens: Sequence[int] = (),
) -> Iterator[list[int | None]]:
    """Continue prompts, all by one token at a time; what is asked for is checked at once, computed when iterated over.

    Args:
        session: computes; it is reset first.
        prompts: token ids of each sequence, of any lengths.
        sampling: how tokens are chosen; greedily unless given.
        max_new_tokens: of each sequence, at most.
        stop_tokens: ids that end a sequence; they are not given.

    Returns:
        An iterator over the next token of every sequence, None for one that has ended; it ends when all have.

    Raises:
        UsageError: a prompt is empty or not of this vocabulary.
    """
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens must be at least 1, not {max_new_tokens}.")
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise UsageError("The prompt is empty. Give at least one token to continue.")
    for prompt in prompts:
        as_tokens(prompt, session.vocab_size)
    return _stream(session, prompts, sampling or Sampling(), max_new_tokens, stop_tokens)


def _stream(
    session: Session,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    max_new_tokens: int,
    stop_tokens: Sequence[int],
) -> Iterator[list[int | None]]:
    stops = torch.tensor(list(stop_tokens), dtype=torch.long)
    session.reset()
    ended = torch.zeros(len(prompts), dtype=torch.bool)
    for tokens in _chosen(session, prompts, sampling.chooser(len(prompts)), max_new_tokens):  # (B,)
        ended |= torch.isin(tokens, stops)
        if ended.all():
            return
        yield [None if over else token for token, over in zip(tokens.tolist(), ended.tolist(), strict=True)]


def _chosen(session: Session, prompts: Sequence[Sequence[int]], choose: Chooser, most: int) -> Iterator[torch.Tensor]:
    """The next tokens of every sequence, (B,) each."""
    tokens = choose(session.prefill(*pad_left(prompts)))
    yield tokens
    # a GPU need not wait for a choice of its own
    write = session.write if isinstance(session, TorchSession) else partial(step_by_step, session)
    yield from write(tokens, choose, most - 1)


class Generation:
    """One text being written: iterate over it, once, for pieces of text as they come.

    Attributes:
        prompt_tokens: ids of the prompt.
        tokens: ids written so far, without the one that ended the text.
        text: what was given of them so far.
        ended: why it is over: "length", "end" (a stop token) or "stop" (a stop string); None while it is not.
        prefill_seconds: time to read the prompt and choose the first token.
        decode_seconds: time for all tokens after the first.
    """

    def __init__(
        self,
        loaded: LoadedSession,
        prompt: str | Sequence[int],
        sampling: Sampling,
        max_new_tokens: int,
        stop: Sequence[str] = (),
    ):
        """Begin; see `generate`. The model first computes when iteration begins."""
        tokenizer = require_tokenizer(loaded)
        self.prompt_tokens = _encode(tokenizer, prompt) if isinstance(prompt, str) else list(prompt)
        self.tokens: list[int] = []
        self.text = ""
        self.ended: str | None = None
        self.prefill_seconds = self.decode_seconds = 0.0
        self._stream, self._filter = TextStream(tokenizer, self.prompt_tokens), StopFilter(stop)
        self._rows = stream_tokens(loaded.session, [self.prompt_tokens], sampling, max_new_tokens, loaded.stop_tokens)
        self._most = max_new_tokens

    def __iter__(self) -> Iterator[str]:
        while self.ended is None:
            piece = self._next()
            self.text += piece
            if piece:
                yield piece

    @property
    def prefill_speed(self) -> float:
        """Tokens of the prompt read a second."""
        return len(self.prompt_tokens) / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_speed(self) -> float:
        """Tokens written a second; the first comes out of reading the prompt and does not count."""
        return max(0, len(self.tokens) - 1) / self.decode_seconds if self.decode_seconds else 0.0

    def _next(self) -> str:
        """One token more; the text it makes certain."""
        begin = time.perf_counter()
        row = next(self._rows, None)
        seconds = time.perf_counter() - begin
        if self.tokens or self.prefill_seconds:
            self.decode_seconds += seconds
        else:
            self.prefill_seconds = seconds
        if row is None:
            self.ended = "length" if len(self.tokens) == self._most else "end"
            return self._filter.push(self._stream.end()) + self._filter.end()
        (token,) = row
        assert token is not None  # a single sequence ends with its iterator
        self.tokens.append(token)
        piece = self._filter.push(self._stream.push(token))
        if self._filter.stopped:
            self.ended = "stop"
        return piece


def generate(
    model: str | Path | LoadedSession,
    prompt: str,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
) -> Generation:
    """Continue a prompt; greedily, unless a temperature, top_k or top_p is given.

    Args:
        model: what `open_session` takes, or what it gave.
        prompt: text to continue.
        max_new_tokens: at most.
        temperature: see `Sampling`, as the next three.
        top_k: sample from the most probable tokens only.
        top_p: sample from those that together have this probability.
        seed: of the sampling.
        stop: strings that end the text; neither they nor what follows is given.

    Returns:
        The text, which is written while it is iterated over: `for piece in generate(...)`, or `"".join(...)`.

    Raises:
        SsmcError: with one sentence on what is wrong and what to do.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    return Generation(_opened(model), prompt, sampling, max_new_tokens, stop)


def generate_batch(
    model: str | Path | LoadedSession,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
) -> list[str]:
    """Continue several prompts at once; of each comes what `generate` would give, with seed + its position.

    Args and errors: see `generate`.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    loaded = _opened(model)
    tokenizer = require_tokenizer(loaded)
    encoded = [_encode(tokenizer, prompt) for prompt in prompts]
    streams = [(TextStream(tokenizer, prompt), StopFilter(stop)) for prompt in encoded]
    texts = [""] * len(prompts)
    for row in stream_tokens(loaded.session, encoded, sampling, max_new_tokens, loaded.stop_tokens):
        for index, (token, (stream, stops)) in enumerate(zip(row, streams, strict=True)):
            texts[index] += "" if token is None else stops.push(stream.push(token))
        if all(stops.stopped or token is None for token, (_, stops) in zip(row, streams, strict=True)):
            break
    return [text + stops.push(stream.end()) + stops.end() for text, (stream, stops) in zip(texts, streams, strict=True)]


def _opened(model: str | Path | LoadedSession) -> LoadedSession:
    return model if isinstance(model, LoadedSession) else open_session(model)


def _encode(tokenizer: Any, prompt: str) -> list[int]:
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:  # bytes of a command line that are no text
        raise UsageError(f"The prompt is not UTF-8 text (character {error.start}). Convert it to UTF-8.") from error
    ids = tokenizer(prompt, verbose=False)["input_ids"]
    if not prompt or not ids:
        raise UsageError("The prompt is empty. Give a text to continue.")
    return list(ids)
