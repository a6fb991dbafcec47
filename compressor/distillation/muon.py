"""What takes the steps: Muon for the projections, Adam for all else.

Muon (Jordan et al. 2024) makes the singular values of a matrix' momentum equal before it steps along it. What a pruned
model lacks is spread over many directions. Adam's steps follow the few in which it lacks most: on `tiny` without a
quarter of its channels they regain less than half as much in as many steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ssmc.runtime.errors import UsageError


class MuonAndAdam:
    """Both as one optimiser, each with the parameters it is for.

    Args:
        groups: {"params": [parameter], "peak": rate} of each parameter.
        matrices: those that Muon takes, of two dimensions.
        pinned: entries that stay zero, which Muon alone would move; None: none of this parameter.

    Raises:
        UsageError: torch is too old.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        matrices: Sequence[nn.Parameter],
        pinned: Sequence[torch.Tensor | None],
    ):
        if not hasattr(torch.optim, "Muon"):
            raise UsageError("Distillation needs torch 2.9 or newer, for its optimiser Muon. Update torch.")
        chosen = {id(matrix) for matrix in matrices}
        split: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
        for group in groups:
            split[id(group["params"][0]) in chosen].append(group)
        self._pinned = [(g["params"][0], p) for g, p in zip(groups, pinned, strict=True) if p is not None]
        self._optimisers: list[torch.optim.Optimizer] = []
        if split[True]:
            # rates mean what they mean for Adam: the root mean square of a step's entries
            muon = torch.optim.Muon(split[True], lr=0.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
            self._optimisers.append(muon)
        if split[False]:
            self._optimisers.append(torch.optim.Adam(split[False], lr=0.0, betas=(0.9, 0.95)))

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Of both."""
        return [group for optimiser in self._optimisers for group in optimiser.param_groups]

    @torch.no_grad()
    def step(self) -> None:
        """One of each."""
        for optimiser in self._optimisers:
            optimiser.step()
        for parameter, entries in self._pinned:
            parameter.masked_fill_(entries, 0)

    def state_dict(self) -> dict[str, Any]:
        """Of both."""
        return {"optimisers": [optimiser.state_dict() for optimiser in self._optimisers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The opposite of `state_dict`."""
        for optimiser, own in zip(self._optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(own)
