"""Where a router sends tokens, with all experts or with some, and what experts then add."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ssmc.compressor.methods.experts.score import ScoredExperts
from ssmc.runtime.models.architectures.experts import with_experts

CORRECTION = "e_score_correction_bias"  # of a router: what is added to scores for the choice alone


def sent(router: nn.Module, hidden: torch.Tensor, left: Sequence[int], experts: int) -> torch.Tensor:
    """By what a router weighs experts where only some are left.

    Args:
        router: of the whole mixture; its forward gives (logits, weights (T, k), experts (T, k)).
        hidden: (T, d_model).
        left: experts it may choose from.
        experts: how many there are.

    Returns:
        (T, experts), zero where a token is not sent.
    """
    index = torch.as_tensor(list(left), device=hidden.device)
    correction = getattr(router, CORRECTION, None)
    if correction is None:
        _, weights, chosen = with_experts(router, left)(hidden)
        chosen = index[chosen]
    else:  # groups stay whole, as the router has them
        barred = torch.full_like(correction, -torch.inf)
        barred[index] = correction[index]
        setattr(router, CORRECTION, barred)
        try:
            _, weights, chosen = router(hidden)
        finally:
            setattr(router, CORRECTION, correction)
    return weights.new_zeros(len(hidden), experts).scatter_(1, chosen, weights).to(hidden.dtype)


def added(layer: ScoredExperts, power: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What every expert adds to the tokens that are sent to it.

    Returns:
        (E,) sums of |g f(x)|^power over these tokens, float64, and (E,) how many they are.
    """
    hidden, module = layer.tokens, layer.module
    weights = sent(getattr(module, layer.part.router), hidden, range(layer.count), layer.count)
    norms, tokens = [], []
    for expert in range(layer.count):
        rows = weights[:, expert].nonzero()[:, 0]
        out = layer.part.put_out(module, hidden[rows], expert).double().norm(dim=1)
        norms.append((weights[rows, expert].double() * out).pow(power).sum())
        tokens.append(len(rows))
    return torch.stack(norms).cpu(), torch.as_tensor(tokens)
