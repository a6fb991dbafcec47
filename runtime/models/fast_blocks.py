"""Blocks of stock models on a GPU: what a block adds to its input, and the norm behind that, in one kernel.

A block of transformers' pure Mamba models ends in a sum, and the block after it, or the model, begins with a norm of
that sum. Decoding is all small kernels, so here the block computes both: the sum is handed on as ever, with what the
norm makes of it as an attribute of the tensor, where the norm finds it (`fast_norms`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ssmc.runtime.models.families import Architecture
from ssmc.runtime.models.fast_norms import EPSILON, has_normed, is_plain_norm, keep_normed, runs_on_gpu
from ssmc.runtime.scan.accelerators import needs_gradients

_MARK = "_ssmc_block"  # attribute of a block that holds its _Behind
_PARTS = ("norm", "mixer", "residual_in_fp32")  # of every block that computes residual + mixer(norm(residual))


@dataclass(frozen=True)
class _Behind:
    """What comes after a block; no module, so that the block has no more parts than before."""

    backend: str
    norm: nn.Module
    as_weight: bool  # whether the norm reads the sum in its weight's dtype, as blocks do and the last norm does not


def use_fast_blocks(architecture: Architecture, model: nn.Module, backend: str) -> None:
    """Let the blocks of a model without attention compute the norm behind them; in place.

    Args:
        architecture: of the model.
        model: a transformers model with fast norms.
        backend: as of `use_fast_scan`.
    """
    if not architecture.capabilities.uniform:
        return
    blocks = list(architecture.blocks(model))
    norms = [getattr(block, "norm", None) for block in blocks[1:]]
    last = dict(model.named_modules()).get(architecture.last_norm)
    for block, norm in zip(blocks, [*norms, last], strict=True):
        ours = _MARK in vars(block) or "forward" not in vars(block)
        if ours and isinstance(norm, nn.Module) and is_plain_norm(norm) and all(hasattr(block, p) for p in _PARTS):
            block.forward = partial(_forward, block)
            setattr(block, _MARK, _Behind(backend, norm, as_weight=norm is not last))


def use_stock_blocks(model: nn.Module) -> None:
    """Undo `use_fast_blocks`."""
    for block in model.modules():
        if _MARK in vars(block):
            delattr(block, _MARK)
            del block.forward


def _forward(
    block: nn.Module,
    hidden_states: torch.Tensor,
    cache_params: Any = None,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """The forward of a block, (B, L, d_model) to the same; with a cache and without gradients in fewer kernels.

    Args:
        block: the block itself.
        hidden_states: (B, L, d_model).
        cache_params: transformers' cache; without one somebody may keep what every block puts out, and would keep what
            the norm makes of it, too.
        attention_mask: see the mixer's.
        kwargs: what other versions of transformers pass; only the stock forward reads it.
    """
    behind: _Behind = getattr(block, _MARK)
    weight = behind.norm.weight
    watched = kwargs or cache_params is None or block._forward_hooks
    elsewhere = weight.device != hidden_states.device  # of a model on several GPUs
    if watched or elsewhere or not runs_on_gpu(behind.backend, [hidden_states, weight]):
        return type(block).forward(
            block, hidden_states, cache_params=cache_params, attention_mask=attention_mask, **kwargs
        )
    from ssmc.runtime.scan.gpu.step import add_and_norm  # imports triton, which is there

    own = block.norm
    normed = own(hidden_states if has_normed(hidden_states, own) else hidden_states.to(own.weight.dtype))
    added = block.mixer(normed, cache_params=cache_params, attention_mask=attention_mask)
    dtype = torch.float32 if block.residual_in_fp32 else torch.promote_types(hidden_states.dtype, added.dtype)
    if needs_gradients([hidden_states, added]):
        return hidden_states.to(dtype) + added
    eps = getattr(behind.norm, EPSILON)
    total, made = add_and_norm(hidden_states, added, weight, eps, dtype, behind.as_weight)
    keep_normed(total, behind.norm, made)
    return total
