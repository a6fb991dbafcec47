"""A session that torch computes: transformers' model and cache, with our scan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from .session import Tokens, as_tokens, check_batch, check_mask


class TorchSession:
    """See `Session` for what the methods promise."""

    runtime = "torch"

    def __init__(self, model: nn.Module):
        """Start with nothing read.

        Args:
            model: a causal language model of transformers in eval mode, with the fast scan (`use_fast_scan`): stock
                transformers starts the states anew in a second prefill.
        """
        self.model = model
        self.vocab_size = model.get_input_embeddings().weight.shape[0]
        self._cache: Any = None
        self._batch: int | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.get_input_embeddings().weight.device

    def reset(self) -> None:
        """Forget everything that was read."""
        self._cache = self._batch = None

    def prefill(self, tokens: Tokens, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Read (B, L) tokens and score what follows, (B, V)."""
        tokens = as_tokens(tokens, self.vocab_size)
        check_batch(tokens, self._batch)
        if mask is not None:
            mask = self._padding(mask, tokens)
        return self._run(tokens, mask)

    def step(self, tokens: torch.Tensor | Sequence[int]) -> torch.Tensor:
        """Read one more token (B,) of every sequence and score what follows, (B, V)."""
        tokens = as_tokens(torch.as_tensor(tokens).view(-1, 1), self.vocab_size)
        check_batch(tokens, self._batch)
        return self._run(tokens, None)

    @torch.inference_mode()
    def _run(self, tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        output = self.model(
            tokens.to(self.device),
            cache_params=self._cache,
            attention_mask=None if mask is None else mask.to(self.device),
            use_cache=True,
            logits_to_keep=1,
        )
        self._cache, self._batch = output.cache_params, len(tokens)
        return output.logits[:, -1].float()

    def _padding(self, mask: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor | None:
        mask = check_mask(mask, tokens, fresh=self._batch is None)
        if bool(mask.all()):
            return None
        if getattr(self.model.config, "use_bias", False):
            # in_proj's bias would reach the convolution's window from the padded positions
            raise UsageError("Prompts of unequal length cannot be padded in a model whose in_proj has a bias.")
        return mask
