"""The last maps of experts, fitted to what is missing from the residual stream, one expert after the other.

What an expert adds for a token is linear in its last map. So each gets the change that takes away most of what is
missing for the tokens that are sent to it, by least squares, and the next one works on what is left then.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ssmc.compressor.methods.ridge import fit
from ssmc.compressor.methods.weights.second_moments import SecondMoment
from ssmc.runtime.models.architectures.experts import Mixture, neurons_of

FEWEST = 2  # tokens for each neuron of an expert; one that fewer are sent to stays as it is


def fit_experts(
    part: Mixture, module: nn.Module, scale: float, pieces: Iterable[tuple[torch.Tensor, torch.Tensor]]
) -> float:
    """Fit the last map of every expert, in place.

    Args:
        part: what the mixture is; nothing linear stands behind its experts.
        module: in the block.
        scale: what its output is multiplied by.
        pieces: of what it reads, (L, d_model), with what is missing from the stream behind it, (L, d_model).

    Returns:
        The sum of squares that is missing afterwards.
    """
    parts = list(pieces)
    hidden, missing = torch.cat([x for x, _ in parts]), torch.cat([m for _, m in parts])
    _, weights, chosen = getattr(module, part.router)(hidden)
    experts: nn.Module = module.experts
    down: torch.Tensor = experts.down_proj.detach()
    for expert in range(len(down)):
        tokens, places = (chosen == expert).nonzero(as_tuple=True)
        alive = (down[expert] != 0).any(0).nonzero()[:, 0]  # columns of zeros are read from what was removed
        if len(tokens) < FEWEST * len(alive):
            continue
        neurons = neurons_of(experts, hidden[tokens], expert)[:, alive]
        x = scale * weights[tokens, places, None] * neurons  # (tokens, alive)
        moment = SecondMoment(len(alive), x.device)
        moment.add(x)
        change = fit((missing[tokens].t() @ x).double(), moment.total)  # (d_model, alive)
        down[expert][:, alive] += change.to(down)
        missing[tokens] -= x @ change.t().to(x)
    return float(missing.double().square().sum())
