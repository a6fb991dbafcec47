"""Which experts a layer can do without best: backward elimination on what it adds, with tokens sent anew.

Without an expert the router sends its tokens to the next best and weighs all of them anew. Both follow from the router
alone, so the error of any set of experts is known once every expert has been run on the tokens:

    error = | (I - P) (sum_e (g_e - g'_e) f_e) |^2

g and g' are the weights before and after, P projects on what linear maps beside the experts can make up for (the expert
that all tokens share, where there is one).
"""

from __future__ import annotations

import torch

from ssmc.compressor.methods.experts.routing import sent
from ssmc.compressor.methods.experts.score import ScoredExperts
from ssmc.compressor.methods.ridge import factor, ridged

TOKENS = 4096  # that are looked at, at most
NUMBERS = 1 << 28  # that all experts put out for them, at most: a gigabyte


def eliminate_experts(layer: ScoredExperts, keep: int, groups: int = 1) -> list[int]:
    """Take away the expert whose loss costs least, until `keep` are left.

    Args:
        layer: the mixture, and what it reads.
        keep: how many experts stay.
        groups: of neighbouring experts, of which as many stay in each.

    Returns:
        The kept experts, ascending.
    """
    most = max(1, min(TOKENS, NUMBERS // (layer.count * layer.tokens.shape[1])))
    step = -(-len(layer.tokens) // most)
    hidden = layer.tokens[::step]
    outputs = torch.stack([layer.part.put_out(layer.module, hidden, e) for e in range(layer.count)])  # (E, T, d_model)
    router, per_group = getattr(layer.module, layer.part.router), layer.count // groups
    spanned = None if layer.beside is None else _spanned(layer.beside[::step])
    left = list(range(layer.count))
    whole = sent(router, hidden, left, layer.count)
    while len(left) > keep:
        errors = {}
        for expert in left:
            others = [other for other in left if other != expert]
            if sum(other // per_group == expert // per_group for other in others) >= keep // groups:
                missing = _missing(whole - sent(router, hidden, others, layer.count), outputs)
                errors[expert] = _unexplained(missing, spanned)
        left.remove(min(errors, key=lambda expert: (errors[expert], expert)))
    return left


def _missing(less: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """What is missing from what the layer adds, (T, d_model), where weights are less by `less` (T, E)."""
    tokens, experts = less.nonzero(as_tuple=True)
    parts = less[tokens, experts, None] * outputs[experts, tokens]
    return torch.zeros_like(outputs[0]).index_add_(0, tokens, parts)


def _spanned(beside: torch.Tensor) -> torch.Tensor | None:
    """U (n, T) with |r|^2 - |U r|^2 what a fit on `beside` (T, n) leaves of r; None where the tokens are too few."""
    tokens, inputs = beside.shape
    if tokens < 2 * inputs:
        return None
    x = beside.double()
    return torch.linalg.solve_triangular(factor(ridged(x.t() @ x)), x.t(), upper=False)


def _unexplained(missing: torch.Tensor, spanned: torch.Tensor | None) -> float:
    error = float(missing.double().square().sum())
    return error if spanned is None else error - float((spanned @ missing.double()).square().sum())
