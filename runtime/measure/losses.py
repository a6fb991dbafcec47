"""The loss of every token under a model, whatever computes it: what perplexity and tasks are made of."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

from ssmc.runtime.models.families import find_family
from ssmc.runtime.models.generation.session import LOGITS_AT_ONCE
from ssmc.runtime.models.llama_cpp import LlamaSession

if TYPE_CHECKING:
    from ssmc.runtime.models.generation import OnnxSession

    LanguageModel: TypeAlias = nn.Module | OnnxSession | LlamaSession
    """A causal language model: transformers' in eval mode, or the session of an export."""

IGNORED = -100
"""The target of a position whose loss is not asked for (cross_entropy's own convention)."""

STEPPED_BATCH = 16
"""Sequences at once that a graph without all logits reads: it reads token by token, and weights are read for each."""


def vocab_size(model: LanguageModel) -> int:
    """Rows of a model's embedding; token ids are below it."""
    return model.get_input_embeddings().weight.shape[0] if isinstance(model, nn.Module) else model.vocab_size


def best_batch(model: LanguageModel, batch: int) -> int:
    """How many sequences to score at once where `batch` are asked for; no score depends on it."""
    graph = None if isinstance(model, nn.Module) else getattr(model, "graph", None)
    stepped = graph is not None and (graph.rounds or not graph.all_logits)
    return max(batch, STEPPED_BATCH) if stepped else batch


@torch.inference_mode()
def token_losses(
    model: LanguageModel, inputs: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """How well a model predicts given tokens from a fresh state.

    Args:
        model: the model.
        inputs: (B, L) token ids; rows that end earlier may be padded on the right with any token.
        targets: (B, L), the token that follows each input, IGNORED where its loss is not asked for.

    Returns:
        Negative log-likelihoods in nats, (B, L) float64, and whether the target was the likeliest token, (B, L) bool;
        0 and False where it was not asked for. Both on the CPU.
    """
    losses, likeliest = torch.zeros(targets.shape, dtype=torch.float64), torch.zeros(targets.shape, dtype=torch.bool)
    wanted = targets != IGNORED
    if isinstance(model, nn.Module):
        losses[wanted], likeliest[wanted] = _of_torch(model, inputs, targets, wanted)
        return losses, likeliest
    if isinstance(model, LlamaSession):
        losses[wanted], likeliest[wanted] = model.losses(inputs, targets, wanted)
        return losses, likeliest
    end = int(wanted.any(dim=0).nonzero().max()) + 1 if wanted.any() else 0
    most, start = LOGITS_AT_ONCE // (model.vocab_size * len(inputs)), 0
    for logits in model.pieces(inputs[:, :end], most):  # (B, n, V)
        piece = slice(start, start + logits.shape[1])
        asked = wanted[:, piece]
        if asked.any():
            found = _losses(logits[asked.to(logits.device)], targets[:, piece][asked])
            losses[:, piece][asked], likeliest[:, piece][asked] = found
        start = piece.stop
    return losses, likeliest


@torch.inference_mode()
def divergence(dense: torch.Tensor, model: nn.Module, inputs: torch.Tensor) -> float:
    """How far a model's predictions are from another's: the mean of KL(other || model) over tokens, in nats.

    Args:
        dense: (B, L, d_model) what the other model's last norm put out, see `last_hidden`.
        model: with the same output embedding.
        inputs: (B, L) token ids, read from a fresh state.
    """
    head, total = model.get_output_embeddings(), 0.0
    step = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
    pairs = zip(dense.flatten(0, 1).split(step), last_hidden(model, inputs).flatten(0, 1).split(step), strict=True)
    for wanted, found in pairs:
        p, q = (F.log_softmax(head(part.to(head.weight)).float(), dim=-1) for part in (wanted, found))
        total += float(F.kl_div(q, p, reduction="sum", log_target=True))
    return total / inputs.numel()


@torch.inference_mode()
def last_hidden(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """(B, L, d_model): what the output embedding of a transformers model reads, row by row from a fresh state."""
    device = model.get_output_embeddings().weight.device
    return torch.cat([model.base_model(row[None].to(device), use_cache=False)[0] for row in inputs])


def _of_torch(
    model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, wanted: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and "is the likeliest", both (T,), of the wanted targets, row by row."""
    head, known = model.get_output_embeddings(), find_family(getattr(model.config, "model_type", None))
    scored = head if known is None else partial(known.logits, model)  # some families scale their logits
    hidden = model.base_model(inputs.to(head.weight.device), use_cache=False)[0]  # (B, L, d_model)
    rows = hidden[wanted.to(hidden.device)].to(head.weight.dtype)  # (T, d_model): what predicts the targets
    step = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
    parts = zip(rows.split(step), targets[wanted].split(step), strict=True)
    losses, likeliest = zip(*(_losses(scored(part), tokens) for part, tokens in parts), strict=True)
    return torch.cat(losses), torch.cat(likeliest)


def _losses(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses in float64 and "is the likeliest", both (T,) on the CPU, of targets (T,) under logits (T, V)."""
    logits, targets = logits.float(), targets.to(logits.device)
    losses = F.cross_entropy(logits, targets, reduction="none").double()
    return losses.cpu(), (logits.argmax(dim=-1) == targets).cpu()
