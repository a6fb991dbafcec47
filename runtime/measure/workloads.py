"""What is timed: one prefill, one decoding step, one layer's scan, as callables without arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ssmc.runtime.measure.losses import vocab_size
from ssmc.runtime.measure.timing import Elapsed
from ssmc.runtime.models.families import Architecture
from ssmc.runtime.models.generation import OnnxSession
from ssmc.runtime.models.generation.cuda_graphs import states_of
from ssmc.runtime.models.generation.torch_session import cache_name
from ssmc.runtime.models.llama_cpp import LlamaSession
from ssmc.runtime.scan import ScanInputs, SsdInputs, accelerator

if TYPE_CHECKING:
    from ssmc.runtime.measure.losses import LanguageModel

STEPS = 8
"""Tokens that llama.cpp writes in one call, as it is asked for whole texts only."""

PROMPT = 16
"""Tokens read before decoding. Its length does not matter to a recurrent model: the state has one size."""


def grid(lengths: Sequence[int], batch_sizes: Sequence[int]) -> list[tuple[int, int]]:
    """The (length, batch) pairs of prefill: every length with the smallest batch, and with larger batches as long as
    that is no more tokens than the longest prefill has, or at least at the shortest length."""
    smallest, most = min(batch_sizes), max(lengths) * min(batch_sizes)
    return [
        (length, batch)
        for batch in sorted(set(batch_sizes))
        for length in sorted(set(lengths))
        if batch == smallest or length * batch <= most or length == min(lengths)
    ]


def random_tokens(model: LanguageModel, batch: int, length: int) -> torch.Tensor:
    """(B, L) ids from the whole vocabulary; the same for every model of that vocabulary."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size(model), (batch, length), generator=generator)
    return tokens.to(model.get_input_embeddings().weight.device) if isinstance(model, nn.Module) else tokens


def prefill(model: LanguageModel, batch: int, length: int) -> Callable[[], torch.Tensor]:
    """Read (B, L) tokens into a fresh cache and score the next token."""
    tokens = random_tokens(model, batch, length)
    if isinstance(model, LlamaSession):
        return lambda: Elapsed(model.time(tokens, 0)["read"])
    if isinstance(model, OnnxSession):
        return lambda: _afresh(model, tokens)

    @torch.inference_mode()
    def run() -> torch.Tensor:
        return model(tokens, use_cache=True, logits_to_keep=1).logits  # (B, 1, V)

    return run


@dataclass(frozen=True)
class Decoding:
    """Sequences in the middle of decoding.

    Attributes:
        run: one step, one token for each of B sequences; returns logits (B, 1, V).
        cache: transformers' cache, which a step changes.
    """

    run: Callable[[], torch.Tensor]
    cache: Any

    def states(self) -> list[torch.Tensor]:
        """The tensors of all layers that a step changes: convolution windows and SSM states."""
        return states_of(self.cache)


def decoding(model: nn.Module, batch: int, prompt: int = PROMPT) -> Decoding:
    """B sequences that have read a prompt of so many tokens."""
    with torch.inference_mode():
        output = model(random_tokens(model, batch, prompt), use_cache=True, logits_to_keep=1)
    name = cache_name(model)
    cache = getattr(output, name)
    tokens = random_tokens(model, batch, 1)

    @torch.inference_mode()
    def run() -> torch.Tensor:
        return model(tokens, **{name: cache}, use_cache=True).logits  # (B, 1, V)

    return Decoding(run, cache)


def decode(model: LanguageModel, batch: int) -> Callable[[], torch.Tensor]:
    """One step: one token for each of B sequences, from the cache of all steps before."""
    if isinstance(model, LlamaSession):
        prompt = random_tokens(model, batch, PROMPT)
        return lambda: Elapsed(model.time(prompt, STEPS)["token"])
    if isinstance(model, OnnxSession):
        _afresh(model, random_tokens(model, batch, PROMPT))
        tokens = random_tokens(model, batch, 1)[:, 0]
        return lambda: model.step(tokens)
    return decoding(model, batch).run


def _afresh(session: OnnxSession, tokens: torch.Tensor) -> torch.Tensor:
    session.reset()
    return session.prefill(tokens)


def scan(
    model: nn.Module, architecture: Architecture, batch: int, length: int, backend: str
) -> Callable[[], torch.Tensor]:
    """The scan of the first layer with its gate, alone, on what that layer computes from (B, L) tokens.

    Kernels for a GPU have the bias and the softplus of the time steps in them, as when the model runs.
    """
    mixer = architecture.mixer(first_block(model, architecture))
    inputs = first_scan_inputs(model, architecture, random_tokens(model, batch, length), backend)

    @torch.inference_mode()
    def run() -> torch.Tensor:
        return architecture.scan(mixer, inputs, backend=backend)[0]  # (B, L, D)

    return run


def first_block(model: nn.Module, architecture: Architecture) -> nn.Module:
    """The first block with a state-space mixer: all of them in a model that is no hybrid."""
    return next(block for block in architecture.blocks(model) if architecture.mixer(block) is not None)


@torch.inference_mode()
def first_scan_inputs(
    model: nn.Module, architecture: Architecture, tokens: torch.Tensor, backend: str = "auto"
) -> ScanInputs | SsdInputs:
    """What the scan of the first layer reads for (B, L) tokens, by that backend."""
    block = first_block(model, architecture)
    mixer = architecture.mixer(block)
    x, z = architecture.expand(mixer, architecture.normed(block, architecture.embed(model, tokens)))
    on_gpu = architecture.capabilities.gpu_scan and accelerator(backend, [x]) is not None
    return architecture.scan_inputs(mixer, x, z, fused=on_gpu)
