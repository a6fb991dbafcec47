"""Taking away whole blocks, or only their SSM.

Mamba-Shedder (NAACL 2025) goes one by one: at each step every removal that is still possible is tried, and the one
that leaves the lowest perplexity on the calibration text is made. Test text is never looked at. The cheaper
`similarity` runs the model once and takes the blocks that change least what they read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ssmc.compressor.options.config import CompressConfig
from ssmc.compressor.options.patterns import LAYER, SSM_MODULE, Score
from ssmc.runtime.models.families import Architecture
from ssmc.runtime.progress import Progress, silent


@dataclass(frozen=True)
class Removal:
    """One step of the greedy search."""

    layer: int
    loss: float | None = None  # nats a token on the calibration text after this removal, where that was measured
    influence: float | None = None  # `similarity`: how far the block turns what it reads, 0 for not at all


def removal_count(n_layer: int, sparsity: float) -> int:
    """How many of `n_layer` layers go: the nearest whole number, at least one, and at least one stays."""
    return min(max(1, round(n_layer * sparsity)), n_layer - 1)


@torch.no_grad()
def shed(
    model: nn.Module,
    architecture: Architecture,
    tokens: torch.Tensor | None,
    config: CompressConfig,
    progress: Progress = silent,
) -> list[Removal]:
    """Remove blocks or SSMs from `model` in place, without changing a shape. Arguments as `choose_removals`."""
    removals = choose_removals(model, architecture, tokens, config, progress)
    for removal in removals:
        _remover(architecture, config)(architecture.blocks(model)[removal.layer])
    return removals


@torch.no_grad()
def choose_removals(
    model: nn.Module,
    architecture: Architecture,
    tokens: torch.Tensor | None,
    config: CompressConfig,
    progress: Progress = silent,
) -> list[Removal]:
    """Which blocks or SSMs to remove; `model` stays as it is.

    Args:
        model: with the fast scan in use.
        architecture: its adapter.
        tokens: (nsamples, seqlen) calibration samples; None for the score `random`.
        config: pattern (`layer`, alone or with others, or `ssm-module`), sparsity, score, seed.
        progress: told about tries.

    Returns:
        The removals in the order they are made.
    """
    blocks = architecture.blocks(model)
    part = LAYER if LAYER in config.parts else SSM_MODULE
    count = removal_count(len(blocks), config.sparsity_of(part))
    if config.judge_of(part) is Score.random:
        order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(config.seed))[:count].tolist()
        return [Removal(layer) for layer in order]
    if config.judge_of(part) is Score.similarity:
        influences = block_influences(model, architecture, tokens, progress)
        order = sorted(range(len(blocks)), key=lambda layer: (influences[layer], layer))[:count]
        return [Removal(layer, influence=influences[layer]) for layer in order]
    return _greedy(model, architecture, tokens, count, _remover(architecture, config), progress)


def _remover(architecture: Architecture, config: CompressConfig) -> Callable[[nn.Module], None]:
    return architecture.remove_block if LAYER in config.parts else architecture.remove_ssm


def block_influences(
    model: nn.Module, architecture: Architecture, tokens: torch.Tensor, progress: Progress = silent
) -> list[float]:
    """Block Influence (ShortGPT, 2024): 1 - mean over tokens of cos(block's input, block's output), for each block.

    Args:
        model: dense.
        architecture: its adapter.
        tokens: (nsamples, seqlen) calibration samples.
        progress: told about samples.
    """
    blocks = architecture.blocks(model)
    cosines = [0.0] * len(blocks)
    for done, sample in enumerate(tokens.split(1)):
        progress("similarity of the layers", done, len(tokens))
        hidden = architecture.embed(model, sample).float()
        for index, block in enumerate(blocks):
            after = block(hidden)  # (1, L, d_model)
            cosines[index] += float(F.cosine_similarity(hidden, after, dim=-1).double().mean()) / len(tokens)
            hidden = after
    return [1 - cosine for cosine in cosines]


def _greedy(
    model: nn.Module,
    architecture: Architecture,
    tokens: torch.Tensor,
    count: int,
    remove: Callable[[nn.Module], None],
    progress: Progress,
) -> list[Removal]:
    """Try every removal left, make the cheapest, until `count` are made; `model` is left as it was.

    The layers before a candidate compute the same with and without it, so a sweep carries their output along and each
    try runs only what follows: half the work.
    """
    blocks = list(architecture.blocks(model))
    removals: list[Removal] = []
    total, done = sum(len(blocks) - i for i in range(count)), 0
    while len(removals) < count:
        gone = {r.layer for r in removals}
        losses = dict.fromkeys((i for i in range(len(blocks)) if i not in gone), 0.0)
        candidates = {i: _without(blocks[i], remove) for i in losses}
        for sample in tokens.split(1):
            hidden = architecture.embed(model, sample).float()
            for i, block in enumerate(blocks):
                if i in losses:
                    without = candidates[i](hidden)
                    losses[i] += _loss(architecture, model, sample, without, blocks[i + 1 :]) / len(tokens)
                hidden = block(hidden)
        best = min(losses, key=lambda i: (losses[i], i))
        removals.append(Removal(best, losses[best]))
        blocks[best] = candidates[best]
        done += len(losses)
        progress("trying removals", done, total)
    return removals


def _without(block: nn.Module, remove: Callable[[nn.Module], None]) -> nn.Module:
    """A copy of a block with its removal made."""
    removed = copy.deepcopy(block)
    remove(removed)
    return removed


def _loss(
    architecture: Architecture, model: nn.Module, sample: torch.Tensor, hidden: torch.Tensor, blocks: list[nn.Module]
) -> float:
    """Mean negative log-likelihood of the next token, in nats, from the hidden states before `blocks`."""
    for block in blocks:
        hidden = block(hidden)
    logits = architecture.head(model, hidden)  # (1, L, vocab)
    return float(F.cross_entropy(logits[0, :-1].float(), sample[0, 1:]))
