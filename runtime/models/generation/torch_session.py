"""A session that torch computes: transformers' model and cache, with our scan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from inspect import signature
from typing import Any, TypeAlias

import torch
from torch import nn

from ssmc.runtime.errors import UsageError
from ssmc.runtime.models.generation.cuda_graphs import NotRecordable, RecordedStep, Recorder, record
from ssmc.runtime.models.generation.sampling import Chooser, Sampling
from ssmc.runtime.models.generation.session import Tokens, as_tokens, check_batch, check_mask, step_by_step

ATTENDED = "past_key_values"
"""What models with attention call their cache, which holds every token, not only states."""


def cache_name(model: nn.Module) -> str:
    """The argument by which a model takes its cache, and the attribute by which it gives it back."""
    return ATTENDED if ATTENDED in signature(model.forward).parameters else "cache_params"


MOST_RECORDED = 4
"""Numbers of sequences and ways to choose whose recorded steps are kept, each with states of its own."""


_Kind: TypeAlias = tuple[int, Sampling | None]  # the number of sequences, and how a step chooses, if it does


class TorchSession:
    """See `Session` for what the methods promise."""

    runtime = "torch"

    def __init__(self, model: nn.Module, recorder: Recorder | None = None):
        """Start with nothing read.

        Args:
            model: a causal language model of transformers in eval mode, with the fast scan (`use_fast_scan`): stock
                transformers starts the states anew in a second prefill.
            recorder: makes what later steps of as many sequences replay; None makes a CUDA graph where the model is on
                a GPU. A model with attention is never recorded: its cache grows.
        """
        self.model = model
        self.vocab_size = model.get_input_embeddings().weight.shape[0]
        self._cache_name = cache_name(model)
        self._mask: torch.Tensor | None = None  # (B, all tokens so far), for models with attention
        self._cache: Any = None
        self._batch: int | None = None
        self._recorder = recorder
        self._recorded: dict[_Kind, RecordedStep | None] = {}  # None: it cannot be

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.get_input_embeddings().weight.device

    def reset(self) -> None:
        """Forget everything that was read."""
        self._cache = self._batch = self._mask = None

    def prefill(self, tokens: Tokens, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Read (B, L) tokens and score what follows, (B, V)."""
        tokens = as_tokens(tokens, self.vocab_size)
        check_batch(tokens, self._batch)
        if mask is not None:
            mask = self._padding(mask, tokens)
        return self._run(tokens, mask)

    @torch.inference_mode()
    def step(self, tokens: torch.Tensor | Sequence[int]) -> torch.Tensor:
        """Read one more token (B,) of every sequence and score what follows, (B, V)."""
        tokens = as_tokens(torch.as_tensor(tokens).view(-1, 1), self.vocab_size)
        check_batch(tokens, self._batch)
        step = self._recorded_step(len(tokens))
        if step is None:
            return self._run(tokens, None)
        logits = step(tokens, self._cache)
        self._hold(step)
        return logits

    def write(self, tokens: torch.Tensor, chooser: Chooser, count: int) -> Iterator[torch.Tensor]:
        """The next `count` tokens of every sequence behind tokens (B,), (B,) each, as steps and choices give them.

        Where steps are recorded, the choice is made in them. Then the session has read one token more than was given
        if the rest is not asked for.
        """
        tokens = as_tokens(tokens.view(-1, 1), self.vocab_size)
        check_batch(tokens, self._batch)
        step = self._recorded_step(len(tokens), replace(chooser.sampling, seed=0)) if count else None
        if step is not None:
            written = step.write(tokens, self._cache, chooser, count)
            self._hold(step)
            yield from written
            return
        yield from step_by_step(self, tokens, chooser, count)

    def _hold(self, step: RecordedStep) -> None:
        """Go on with the states of a step; those of all others are behind from now on."""
        self._cache = step.cache
        for other in filter(None, self._recorded.values()):
            other.overtaken |= other is not step

    def _recorded_step(self, batch: int, sampling: Sampling | None = None) -> RecordedStep | None:
        """What replays a step of so many sequences, recorded now if it was not before; None where that cannot be."""
        recorder = self._recorder or (record if self.device.type == "cuda" else None)
        if recorder is None or self._cache is None or self._cache_name == ATTENDED:
            return None
        kind = (batch, sampling)
        if kind not in self._recorded:
            if len(self._recorded) == MOST_RECORDED:
                del self._recorded[next(iter(self._recorded))]
            try:
                self._recorded[kind] = RecordedStep(self.model, self._cache, batch, recorder, sampling)
            except NotRecordable:
                self._recorded[kind] = None
        return self._recorded[kind]

    @torch.inference_mode()
    def _run(self, tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        given: dict[str, Any] = {self._cache_name: self._cache}
        if self._cache_name == ATTENDED:
            mask = self._mask = self._attended(tokens, mask)
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            given["position_ids"] = positions.to(self.device)  # some families count from 0 in every call
        output = self.model(
            tokens.to(self.device),
            attention_mask=None if mask is None else mask.to(self.device),
            use_cache=True,
            logits_to_keep=1,
            **given,
        )
        self._cache, self._batch = getattr(output, self._cache_name), len(tokens)
        for step in filter(None, self._recorded.values()):
            step.overtaken = True
        return output.logits[:, -1].float()

    def _attended(self, tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The mask of all tokens, those that were read before too: attention sees them again."""
        mask = torch.ones(tokens.shape, dtype=torch.long) if mask is None else mask
        return mask if self._mask is None else torch.cat([self._mask, mask], dim=1)

    def _padding(self, mask: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor | None:
        mask = check_mask(mask, tokens, fresh=self._batch is None)
        if bool(mask.all()):
            return None
        if any(getattr(self.model.config, name, False) for name in ("use_bias", "mamba_proj_bias", "add_bias_linear")):
            # in_proj's bias would reach the convolution's window from the padded positions
            raise UsageError("Prompts of unequal length cannot be padded in a model whose in_proj has a bias.")
        return mask
