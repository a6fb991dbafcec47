"""A session that onnxruntime computes, its states in buffers that stay where they are.

Two sets of state buffers take turns: a call reads the pasts from one and writes the presents into the other, and the
next call reads those. onnxruntime is given addresses (IOBinding) and copies nothing in between. Keys and values of
attention grow: their presents are new buffers at every call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ssmc.runtime.errors import CheckpointError
from ssmc.runtime.models.generation.onnx_graph import IDS, LOGITS, MASK, Graph, Slot, reason
from ssmc.runtime.models.generation.session import LOGITS_AT_ONCE, Tokens, as_tokens, check_batch, check_mask


class OnnxSession:
    """See `Session` for what the methods promise; logits lie in a buffer that the next call overwrites."""

    runtime = "onnx"

    def __init__(self, graph: Graph):
        """Start with nothing read."""
        self.graph = graph
        self.vocab_size = graph.vocab_size
        self._fresh = True
        self._batch: int | None = None
        self._states: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])  # pasts, presents of the next call
        self._token = self._ones = self._logits = torch.empty(0)
        self._seen = torch.empty(0, 0, dtype=torch.long)  # the mask of all tokens so far, where the graph wants it
        self._grows = any(past.grows is not None for past, _ in graph.states)
        self._steps: tuple[Any, Any] = (None, None)  # bindings of a step, for the next call and the one after

    @property
    def device(self) -> torch.device:
        """Where the graph runs and the buffers lie."""
        return self.graph.device

    def reset(self) -> None:
        """Forget everything that was read."""
        self._fresh = True

    def prefill(self, tokens: Tokens, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Read (B, L) tokens and score what follows, (B, V)."""
        tokens = as_tokens(tokens, self.vocab_size)
        if not self._fresh:
            check_batch(tokens, self._batch)
        mask = torch.ones_like(tokens) if mask is None else check_mask(mask, tokens, fresh=self._fresh)
        # a graph that gives all logits would hold (B, L, V) of them for the last one's sake
        most = max(1, LOGITS_AT_ONCE // (self.vocab_size * len(tokens))) if self.graph.all_logits else tokens.shape[1]
        for piece in zip(tokens.split(most, dim=1), mask.split(most, dim=1), strict=True):
            logits = self._read(*piece)
        return logits[:, -1]

    def step(self, tokens: torch.Tensor | Sequence[int]) -> torch.Tensor:
        """Read one more token (B,) of every sequence and score what follows, (B, V)."""
        tokens = as_tokens(torch.as_tensor(tokens).view(-1, 1), self.vocab_size)
        if self._fresh:
            return self.prefill(tokens)
        check_batch(tokens, self._batch)
        self._token.copy_(tokens)
        if self._grows:
            self._states = (self._states[0], self._presents(1))
            self._run(self._binding(*self._states, self._token, self._mask(self._ones), self._logits))
        else:
            self._run(self._steps[0])
        return self._logits[:, -1].float()

    def pieces(self, tokens: torch.Tensor, most: int) -> Iterator[torch.Tensor]:
        """Logits at all positions of fresh sequences, piece by piece.

        Args:
            tokens: (B, L).
            most: positions of a piece at most; a graph that gives only the last logits, or that rounds its states after
                every call, reads one token at a time.

        Yields:
            (B, n, V) float32, n positions further on each time; the next piece may overwrite it.
        """
        tokens = as_tokens(tokens, self.vocab_size)
        self.reset()
        if self.graph.all_logits and not self.graph.rounds:
            for piece in tokens.split(max(1, most), dim=1):
                yield self._read(piece, torch.ones_like(piece))
        else:
            for token in tokens.unbind(dim=1):
                yield self.step(token)[:, None]

    def buffers(self) -> list[int]:
        """Addresses of all buffers that outlive a call; they change only with the batch size."""
        return sorted(t.data_ptr() for t in (*self._states[0], *self._states[1], self._token, self._ones, self._logits))

    def _read(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Read any (B, L) tokens; logits (B, 1 or L, V)."""
        if self._fresh:
            self._start(len(tokens))
        length = tokens.shape[1]
        if self.graph.all_logits and length > 1:
            logits = self._empty(self.graph.logits, len(tokens), length)
        else:
            logits = self._logits
        tokens, mask = (t.to(self.device).contiguous() for t in (tokens, mask))
        if self._grows:
            self._states, mask = (self._states[0], self._presents(length)), self._mask(mask)
        self._run(self._binding(*self._states, tokens, mask, logits))
        return logits.float()

    def _mask(self, mask: torch.Tensor) -> torch.Tensor:
        """What the graph is told of tokens that come now: that of all so far, or theirs."""
        if not self.graph.whole_mask:
            return mask
        self._seen = torch.cat([self._seen, mask], dim=1)
        return self._seen

    def _start(self, batch: int) -> None:
        """Zero states for `batch` sequences, in the buffers that are there if the number is the same."""
        if batch != self._batch:
            self._allocate(batch)
        for place, ((past, _), state) in enumerate(zip(self.graph.states, self._states[0], strict=True)):
            if past.grows is None:
                state.zero_()
            else:
                self._states[0][place] = self._empty(past, batch)
        self._seen = torch.empty(batch, 0, dtype=torch.long, device=self.device)
        self._fresh = False

    def _allocate(self, batch: int) -> None:
        one, other = ([self._empty(past, batch) for past, _ in self.graph.states] for _ in range(2))
        self._token = torch.zeros(batch, 1, dtype=torch.long, device=self.device)
        self._ones = torch.ones_like(self._token)
        self._logits = self._empty(self.graph.logits, batch, 1)
        self._states, self._batch = (one, other), batch
        fixed = (self._token, self._ones, self._logits)
        if not self._grows:
            self._steps = (self._binding(one, other, *fixed), self._binding(other, one, *fixed))

    def _presents(self, length: int) -> list[torch.Tensor]:
        """Where the states behind `length` more tokens go: what grows gets new buffers."""
        found = list(self._states[1])
        for place, ((past, _), old) in enumerate(zip(self.graph.states, self._states[0], strict=True)):
            if past.grows is not None:
                shape = list(old.shape)
                shape[1 + past.grows] += length
                found[place] = torch.empty(shape, dtype=old.dtype, device=self.device)
        return found

    def _empty(self, slot: Slot, *before: int) -> torch.Tensor:
        return torch.empty(*before, *slot.shape, dtype=slot.dtype, device=self.device)

    def _binding(
        self,
        pasts: list[torch.Tensor],
        presents: list[torch.Tensor],
        tokens: torch.Tensor,
        mask: torch.Tensor,
        logits: torch.Tensor,
    ) -> Any:
        """Tell onnxruntime where everything is; the tensors must outlive the call."""
        binding = self.graph.session.io_binding()
        place = (self.device.type, self.device.index or 0)
        for name, tensor in ((IDS, tokens), (MASK, mask)):
            binding.bind_input(name, *place, np.int64, tuple(tensor.shape), tensor.data_ptr())
        for (past, present), old, new in zip(self.graph.states, pasts, presents, strict=True):
            if old.numel():
                binding.bind_input(past.name, *place, past.numpy_dtype, tuple(old.shape), old.data_ptr())
            else:  # a convolution of one tap, or an empty cache: nothing has no address
                binding.bind_cpu_input(past.name, old.cpu().numpy())
            if not new.numel():
                binding.bind_output(present.name)
                continue
            binding.bind_output(present.name, *place, present.numpy_dtype, tuple(new.shape), new.data_ptr())
        slot = self.graph.logits
        binding.bind_output(LOGITS, *place, slot.numpy_dtype, tuple(logits.shape), logits.data_ptr())
        return binding

    def _run(self, binding: Any) -> None:
        """Compute, and let the presents be the pasts of the next call."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # onnxruntime has a stream of its own
        try:
            self.graph.session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime's own classes
            raise CheckpointError(f"onnxruntime could not run the graph ({reason(error)}). Export it again.") from error
        self._states, self._steps = self._states[::-1], self._steps[::-1]
