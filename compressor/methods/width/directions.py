"""Directions of the residual stream that can be done without: principal components, or those that cost least.

Where the stream keeps only a subspace, each norm s hands on what it read less N y, N the projection on what was cut.
To second order, and where the norms are taken for independent, the predictions diverge by half of

    sum_s E[(g' N y)^2]  ~  sum_s tr(G_s N C_s N),        C_s = E[y y'],  G_s = E[g g'],

y what norm s puts out and g the gradient there (the Fisher information, see `channels.fisher`). A direction is cheap
where little is in it, or where nobody asks for it; principal components know only the first.
"""

from __future__ import annotations

import math

import torch

STEPS = 200
STRIDE = 0.5  # what an entry of the directions moves at most in a step, in units of their mean size


def principal_directions(moment: torch.Tensor) -> torch.Tensor:
    """Eigenvectors of a second moment (D, D) as columns, the largest first."""
    return torch.linalg.eigh(moment)[1].flip(1)


def cost_of_cutting(read: torch.Tensor, cost: torch.Tensor, gone: torch.Tensor) -> torch.Tensor:
    """sum_s tr(G_s N C_s N) for N = U U'.

    Args:
        read: C, (S, D, D).
        cost: G, (S, D, D).
        gone: U, (D, R) orthonormal directions that are cut.
    """
    return ((gone.t() @ read @ gone) * (gone.t() @ cost @ gone).transpose(1, 2)).sum()


def least_cost_directions(read: torch.Tensor, cost: torch.Tensor, keep: int) -> torch.Tensor:
    """An orthonormal basis (D, keep) of the subspace that is cheapest to be left with.

    Adam on the directions that go, which are made orthonormal at every step, from the principal components of what is
    read weighed by the size of its gradients; a descent finds the same from elsewhere.

    Args:
        read: second moments (S, D, D) of what norms put out.
        cost: those of the gradients there.
        keep: how many directions stay, below D.
    """
    weighed = (read * cost.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]).sum(0)
    start = principal_directions(weighed)
    best, least = start, float(cost_of_cutting(read, cost, start[:, keep:]))
    directions = start[:, keep:].clone().requires_grad_()
    optimiser = torch.optim.Adam([directions], lr=STRIDE / math.sqrt(len(start)))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    with torch.enable_grad():
        for _ in range(STEPS):
            gone = torch.linalg.qr(directions)[0]
            loss = cost_of_cutting(read, cost, gone)
            if float(loss.detach()) < least:
                least, best = float(loss.detach()), torch.linalg.qr(gone.detach(), mode="complete")[0].roll(keep, 1)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return best[:, :keep].detach()
