"""What the norms of the residual stream put out, and what errors there and in the stream cost the predictions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ssmc.compressor.methods.channels.fisher import AT_ONCE, TOKENS, backward_of_drawn
from ssmc.compressor.methods.gradients import only_these_move
from ssmc.compressor.methods.method import Survey
from ssmc.compressor.methods.width.score import StreamMoments
from ssmc.runtime.models.architectures.residual import Site, sites, written


@dataclass
class _Sums:
    """Sums over tokens, (S, D, D) each, and over samples, (D,)."""

    read: torch.Tensor
    cost: torch.Tensor
    stream: torch.Tensor
    squares: torch.Tensor
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)  # norm -> what it read, put out


def stream_moments(survey: Survey, text: bool, gradients: bool) -> StreamMoments:
    """Run the dense model on calibration samples, 16,384 tokens of them at most.

    Args:
        survey: the dense model.
        text: whether anything asks for moments at all; without it they are zero.
        gradients: whether anything asks what errors cost, which takes a backward pass.
    """
    architecture, model, device = survey.plan.architecture, survey.model, survey.stage.device
    places, d_model = sites(architecture, model), survey.plan.sizes.d_model
    zeros = torch.zeros(3, len(places), d_model, d_model, dtype=torch.float64, device=device)
    sums = _Sums(zeros[0], zeros[1], zeros[2], torch.zeros(len(places), d_model, dtype=torch.float64, device=device))
    tokens = survey.text[: -(-TOKENS // survey.text.shape[1])] if text else torch.empty(0, 1, dtype=torch.long)
    model.to(device)
    generator = torch.Generator().manual_seed(survey.plan.config.seed)
    with only_these_move((), model), _watched(survey, places, sums, gradients):
        parts = tokens.split(max(1, AT_ONCE // tokens.shape[1]))
        for done, rows in enumerate(parts if text else ()):
            survey.progress("what the residual stream holds", done, len(parts))
            if gradients:
                with torch.enable_grad():
                    backward_of_drawn(survey, rows.to(device), generator)
            else:
                model.base_model(rows.to(device), use_cache=False)  # type: ignore[operator]
            _add(survey, places, sums, gradients)
    model.cpu()
    count = max(1, tokens.numel())
    means = sums.squares.sqrt().sum(0)
    cost, stream = (sums.cost / count, sums.stream / count) if gradients else (None, None)
    sizes = _sizes(survey, places).to(device)
    return StreamMoments(sums.read / count, cost, stream, means, sizes, survey.plan.config.seed)


@contextmanager
def _watched(survey: Survey, places: list[Site], sums: _Sums, gradients: bool) -> Iterator[None]:
    """Inside the block, what the norms read and put out is kept, with its gradients where they are taken."""

    def keep(number: int) -> Any:
        def hook(_: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if gradients:
                inputs[0].retain_grad()
                output.retain_grad()
            sums.seen[number] = inputs[0], output

        return hook

    embedding: Any = survey.model.get_input_embeddings()  # type: ignore[operator]
    hooks = [survey.model.get_submodule(site.norm).register_forward_hook(keep(i)) for i, site in enumerate(places)]
    if gradients:
        hooks.append(embedding.register_forward_hook(lambda _, __, output: output.detach().requires_grad_()))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _add(survey: Survey, places: list[Site], sums: _Sums, gradients: bool) -> None:
    """Add what was seen of some samples; y is what a norm puts out without its weight."""
    for number, (x, output) in sums.seen.items():
        norm: Any = survey.model.get_submodule(places[number].norm)
        y = x.detach().float() * torch.rsqrt(x.detach().float().square().mean(-1, keepdim=True) + norm.variance_epsilon)
        sums.squares[number] += (y * norm.weight).abs().mean(1).double().square().sum(0)
        sums.read[number] += _moment(y)
        if gradients:
            sums.cost[number] += _moment(output.grad.float() * norm.weight)  # type: ignore[union-attr]
            sums.stream[number] += _moment(x.grad)  # type: ignore[arg-type]
    sums.seen.clear()


def _moment(x: torch.Tensor) -> torch.Tensor:
    """Sum of x x' over all tokens of (B, L, D)."""
    flat = x.flatten(0, 1).double()
    return flat.t() @ flat


def _sizes(survey: Survey, places: list[Site]) -> torch.Tensor:
    """Squared size of all weights that a coordinate of the stream has, (D,)."""
    model: Any = survey.model
    total = model.get_input_embeddings().weight.double().square().sum(0)
    for site in places:
        norm = model.get_submodule(site.norm).weight.double()
        for reader in site.readers:
            total = total + (model.get_parameter(reader).double() * norm).square().flatten(0, -2).sum(0)
        for writer in site.writers:
            for name, axis in written(model, writer).items():
                if (weight := model.get_parameter(name).double()).dim() > 1:
                    total = total + weight.square().movedim(axis, 0).flatten(1).sum(1)
    return total.detach()
