"""What a session is, whatever computes it: a model with the states of the sequences it has read so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeAlias

import torch

from ssmc.runtime.errors import UsageError

LOGITS_AT_ONCE = 2**24
"""Entries of the float32 logits held at a time (64 MiB): 2048 tokens of a 50k vocabulary would be 400 MiB."""

Tokens: TypeAlias = torch.Tensor | Sequence[Sequence[int]] | Sequence[int]


class Session(Protocol):
    """A language model that reads tokens and remembers what it read, for B sequences at once.

    Attributes:
        runtime: what computes, "torch" or "onnx".
        vocab_size: V, rows of the embedding; token ids are below it.
    """

    runtime: str
    vocab_size: int

    def reset(self) -> None:
        """Forget everything that was read; the next prefill may have another batch size."""

    def prefill(self, tokens: Tokens, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Read tokens and score what follows them; a second call goes on where the first ended.

        Args:
            tokens: (B, L) ids.
            mask: (B, L), 1 at tokens and 0 at padding on the left; None: nothing is padded.

        Returns:
            Logits of the token after the last one, (B, V) float32. They may lie in a buffer that the next call
            overwrites.

        Raises:
            UsageError: no tokens, ids outside the vocabulary, another batch size than before, or a mask that is not
                one of padding on the left of fresh sequences.
        """

    def step(self, tokens: torch.Tensor | Sequence[int]) -> torch.Tensor:
        """Read one more token (B,) of every sequence; returns the same as `prefill`."""


def step_by_step(
    session: Session, tokens: torch.Tensor, choose: Callable[[torch.Tensor], torch.Tensor], count: int
) -> Iterator[torch.Tensor]:
    """The next `count` tokens of every sequence behind tokens (B,) or (B, 1), (B,) each, chosen from logits (B, V)."""
    for _ in range(count):
        tokens = choose(session.step(tokens))
        yield tokens


def as_tokens(tokens: Tokens, vocab_size: int) -> torch.Tensor:
    """Token ids as (B, L) int64 on the CPU; of a single sequence, B is 1.

    Raises:
        UsageError: there are none, or the vocabulary has none of that id.
    """
    found = torch.as_tensor(tokens, dtype=torch.long, device="cpu")
    found = found[None] if found.ndim == 1 else found
    if found.ndim != 2 or not found.numel():
        raise UsageError("There are no tokens to read. Give a prompt that is not empty.")
    if int(found.min()) < 0 or int(found.max()) >= vocab_size:
        outside = int(found.min()) if int(found.min()) < 0 else int(found.max())
        raise UsageError(
            f"The prompt has token id {outside}, the model's vocabulary ends at {vocab_size - 1}: the tokenizer "
            "belongs to another model. Name the right one with --tokenizer."
        )
    return found


def check_mask(mask: torch.Tensor, tokens: torch.Tensor, fresh: bool) -> torch.Tensor:
    """A mask as (B, L) int64 on the CPU, where it says no more than padding on the left of fresh sequences.

    Raises:
        UsageError: it says something else.
    """
    mask = torch.as_tensor(mask, device="cpu").long()
    wrong = mask.shape != tokens.shape or bool((mask.diff(dim=1) < 0).any()) or not bool((mask[:, -1] == 1).all())
    if wrong or not fresh:
        raise UsageError(
            "The mask is not one of padding on the left of fresh sequences: every row must be zeros, then ones, and "
            "end in a token, and nothing may have been read before. Pad on the left, or read piece by piece unpadded."
        )
    return mask


def check_batch(tokens: torch.Tensor, batch: int | None) -> None:
    """Refuse another number of sequences than the states are of; `batch` is None before anything was read.

    Raises:
        UsageError: the numbers differ.
    """
    if batch is not None and len(tokens) != batch:
        raise UsageError(f"The session holds {batch} sequences, {len(tokens)} came. Call reset() first.")


def pad_left(sequences: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Sequences of different lengths as (B, L) ids with zeros on the left, and the mask; None where none is needed."""
    length = max(map(len, sequences))
    if all(len(sequence) == length for sequence in sequences):
        return torch.tensor([list(sequence) for sequence in sequences], dtype=torch.long), None
    tokens = torch.tensor([[0] * (length - len(s)) + list(s) for s in sequences], dtype=torch.long)
    lengths = torch.tensor([len(s) for s in sequences])
    return tokens, (torch.arange(length) >= length - lengths[:, None]).long()
