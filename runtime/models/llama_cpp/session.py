"""A session that llama.cpp computes: one sequence at a time, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ssmc.runtime.errors import UsageError
from ssmc.runtime.models.generation.session import Tokens, as_tokens, check_batch, check_mask
from ssmc.runtime.models.llama_cpp.client import LlamaCpp

MOST = 2**15  # tokens of a sequence at most: keys and values of a hybrid take memory for all of them at once


class LlamaSession:
    """See `Session` for what the methods promise; log probabilities stand for logits, which differ by a constant.

    Tokens that were read are sent again with every call; llama.cpp knows them and computes only what is new.
    """

    runtime = "llama.cpp"
    max_batch = 1

    def __init__(self, path: str | Path, vocab_size: int, *, context: int = 4096, threads: int | None = None):
        """Load a file; it is loaded again with more room when a text does not fit.

        Args:
            path: of the GGUF file.
            vocab_size: rows of the embedding.
            context: tokens of a sequence at most, to begin with.
            threads: None: as many as torch takes.
        """
        self.path, self.vocab_size = Path(path), vocab_size
        self._threads = torch.get_num_threads() if threads is None else threads
        self._context = context
        self._llama = LlamaCpp(self.path, context=context, threads=self._threads)
        self._read: list[int] = []

    @property
    def llama(self) -> LlamaCpp:
        """The process."""
        return self._llama

    def close(self) -> None:
        """End the process."""
        self._llama.close()

    def reset(self) -> None:
        """Forget everything that was read."""
        self._read = []

    def prefill(self, tokens: Tokens, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Read (1, L) tokens and score what follows, (1, V)."""
        tokens = as_tokens(tokens, self.vocab_size)
        check_batch(tokens, 1)
        if mask is not None:
            tokens = tokens[check_mask(mask, tokens, fresh=not self._read) == 1][None]
        fresh = not self._read
        self._read += tokens[0].tolist()
        self.make_room(len(self._read) + 1)
        found = self._llama.log_probs(self._read, self.vocab_size, cached=not fresh)
        return torch.from_numpy(found.copy())[None]

    def step(self, tokens: torch.Tensor | Sequence[int]) -> torch.Tensor:
        """Read one more token (1,) and score what follows, (1, V)."""
        return self.prefill(torch.as_tensor(tokens).view(-1, 1))

    def losses(
        self, inputs: torch.Tensor, targets: torch.Tensor, wanted: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Negative log-likelihoods of the wanted targets (T,) float64, row by row, and whether each was the likeliest.

        Args:
            inputs: (B, L) token ids, rows padded on the right with any.
            targets: (B, L) the token behind each input.
            wanted: (B, L), which of them are asked for.
        """
        losses, likeliest = [], []
        for row, following, asked in zip(inputs, targets, wanted, strict=True):
            places = asked.nonzero()[:, 0].tolist()
            if not places:
                continue
            first, end = places[0], places[-1] + 1
            text = [*row[:end].tolist(), int(following[end - 1])]
            if any(text[place + 1] != following[place] for place in places):
                raise ValueError("targets are the inputs that follow, but for the last")
            self.make_room(len(text) + 1)
            values, same = self._llama.score(text, first + 1)
            losses += [-values[place - first] for place in places]
            likeliest += [same[place - first] for place in places]
        self.reset()
        return torch.tensor(losses, dtype=torch.float64), torch.tensor(likeliest, dtype=torch.bool)

    def time(self, tokens: torch.Tensor, new: int) -> dict[str, float]:
        """Seconds to read (1, L) tokens, and of each of so many more, by llama.cpp's own clock; see `LlamaCpp.time`."""
        check_batch(tokens, 1)
        self.make_room(tokens.shape[1] + new + 2)
        self.reset()
        return self._llama.time(tokens[0].tolist(), new)

    def make_room(self, length: int) -> None:
        """Load the file again if so many tokens do not fit.

        Raises:
            UsageError: nothing fits them.
        """
        if length <= self._context:
            return
        if length > MOST:
            raise UsageError(f"llama.cpp is given {MOST} tokens at once here, {length} came. Use a shorter text.")
        self._context = min(MOST, max(length, 2 * self._context))
        self._llama.close()
        self._llama = LlamaCpp(self.path, context=self._context, threads=self._threads)
