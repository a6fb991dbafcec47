"""Taking away whole blocks, or only their SSM.

Mamba-Shedder (NAACL 2025) goes one by one: at each step every removal that is still possible is tried, and the one
that leaves the lowest perplexity on the calibration text is made. Test text is never looked at. The cheaper
`similarity` runs the model once and takes the blocks that change least what they read.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ssmc.compressor.methods.layers.score import Removal
from ssmc.compressor.methods.method import Survey
from ssmc.compressor.options.patterns import ATTENTION
from ssmc.runtime.models.families import Architecture

TOKENS = 8192
"""The choice looks at no more: it compares removals on the same text, and each costs half a pass of the model."""


def decides_on(samples: torch.Tensor) -> int:
    """How many tokens of (n, L) samples the choice looks at."""
    return min(len(samples), math.ceil(TOKENS / samples.shape[1])) * samples.shape[1]


@torch.no_grad()
def block_influences(survey: Survey) -> list[float]:
    """Block Influence (ShortGPT, 2024): 1 - mean over tokens of cos(block's input, block's output), for each block."""
    architecture, model, tokens = survey.plan.architecture, survey.model, survey.text
    blocks = architecture.blocks(model)
    cosines = [0.0] * len(blocks)
    architecture.record_arguments(model, tokens[:1])
    for done, sample in enumerate(tokens.split(1)):
        survey.progress("similarity of the layers", done, len(tokens))
        hidden = architecture.embed(model, sample).float()
        for index, block in enumerate(blocks):
            after = architecture.run(block, hidden)  # (1, L, d_model)
            cosines[index] += float(F.cosine_similarity(hidden, after, dim=-1).double().mean()) / len(tokens)
            hidden = after
    return [1 - cosine for cosine in cosines]


@torch.no_grad()
def least_loss_removals(survey: Survey, count: int, remove: Callable[[nn.Module], None]) -> list[Removal]:
    """Try every removal left, make the cheapest, until `count` are made; the model is left as it was.

    The layers before a candidate compute the same with and without it, so a sweep carries their output along and each
    try runs only what follows: half the work.

    Args:
        survey: the dense model and calibration samples; the removals that it knows are the first ones.
        count: of removals.
        remove: makes one, in place.
    """
    architecture, model = survey.plan.architecture, survey.model
    blocks = list(architecture.blocks(model))
    text = survey.text[: math.ceil(TOKENS / survey.text.shape[1])]  # samples come in random order
    removals: list[Removal] = list(survey.removals[:count])
    for known in removals:
        blocks[known.layer] = _without(blocks[known.layer], remove)
    architecture.record_arguments(model, survey.text[:1])
    total, done = sum(len(blocks) - i for i in range(len(removals), count)), 0
    while len(removals) < count:
        gone = {r.layer for r in removals}
        losses = dict.fromkeys(_removable(survey.plan.architecture, blocks, gone), 0.0)
        candidates = {i: _without(blocks[i], remove) for i in losses}
        for sample in text.split(1):
            hidden = architecture.embed(model, sample).float()
            for i, block in enumerate(blocks):
                if i in losses:
                    without = architecture.run(candidates[i], hidden)
                    losses[i] += _loss(survey, sample, without, blocks[i + 1 :]) / len(text)
                hidden = architecture.run(block, hidden)
        best = min(losses, key=lambda i: (losses[i], i))
        removals.append(Removal(best, losses[best]))
        blocks[best] = candidates[best]
        done += len(losses)
        survey.progress("trying removals", done, total)
    return removals


def first_removable(survey: Survey, order: Iterable[int], count: int) -> list[int]:
    """The first blocks of an order that may go one after the other, `count` of them."""
    blocks, gone = survey.plan.architecture.blocks(survey.model), list[int]()
    for index in order:
        if len(gone) < count and index in _removable(survey.plan.architecture, blocks, {*gone}):
            gone.append(index)
    return gone


def _removable(architecture: Architecture, blocks: Sequence[nn.Module], gone: set[int]) -> list[int]:
    """The blocks that may go next: one with a mixer stays, and one with attention if there is any.

    Without a mixer a model is none of its family, and caches of transformers count tokens by a layer of attention.
    """
    left = [i for i in range(len(blocks)) if i not in gone]
    with_mixer = [i for i in left if architecture.mixer(blocks[i]) is not None]
    attention = [part for part in architecture.units if part.kind == ATTENTION]
    with_attention = [i for i in left if any(part.inside(blocks[i]) is not None for part in attention)]
    return [i for i in left if with_mixer != [i] and with_attention != [i]]


def _without(block: nn.Module, remove: Callable[[nn.Module], None]) -> nn.Module:
    """A copy of a block with its removal made."""
    removed = copy.deepcopy(block)
    remove(removed)
    return removed


def _loss(survey: Survey, sample: torch.Tensor, hidden: torch.Tensor, blocks: list[nn.Module]) -> float:
    """Mean negative log-likelihood of the next token, in nats, from the hidden states before `blocks`."""
    for block in blocks:
        hidden = survey.plan.architecture.run(block, hidden)
    logits = survey.plan.architecture.head(survey.model, hidden)  # (1, L, vocab)
    return float(F.cross_entropy(logits[0, :-1].float(), sample[0, 1:]))
