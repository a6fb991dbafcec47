"""Whole blocks taken out of a state dict."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from ssmc.runtime.later import torch
from ssmc.runtime.models.architectures.plan import Cut


def without_blocks(
    tensors: Mapping[str, torch.Tensor], block_prefix: Callable[[int], str], kept: Sequence[int]
) -> tuple[dict[str, torch.Tensor], list[Cut]]:
    """The tensors of a model that has only some of its blocks, which are numbered anew, and what went.

    Args:
        tensors: by the model's names.
        block_prefix: how the names of a block's tensors start.
        kept: the blocks that stay, ascending.
    """
    number = {block_prefix(old): block_prefix(new) for new, old in enumerate(kept)}
    pattern = re.compile(re.escape(block_prefix(0)).replace("0", r"\d+", 1) + "|")
    out, cuts = {}, []
    for name, tensor in tensors.items():
        match = pattern.match(name)
        prefix = match[0] if match else ""
        if not prefix or prefix in number:
            out[number.get(prefix, "") + name[len(prefix) :]] = tensor
        else:
            cuts.append(Cut(name, tuple(tensor.shape), ()))
    return out, cuts
