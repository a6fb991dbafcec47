"""What is added to the narrow stream and what is read from it, fitted to the dense model's stream.

Both are linear maps of what the dense model computes: with x_s what norm s reads and Delta_s = x_s - x_(s-1) what was
added since the norm before, the narrow stream is z_s = sum_(j <= s) P_j Delta_j, and the norm's output y_s is read as
A_s z_s / |z_s|. To second order, and where the norms are taken for independent, the predictions diverge by half of

    sum_s E[e_s' G_s e_s],        e_s = y_s - A_s z_s / |z_s|,

G_s the Fisher information at norm s (`directions`). No gradient goes through the model: this is one least-squares
problem for all maps together, of which A alone has a closed solution.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ssmc.compressor.methods.channels.fisher import AT_ONCE, symmetric_root
from ssmc.compressor.methods.descent import Pace, descend
from ssmc.compressor.methods.method import Survey
from ssmc.compressor.methods.ridge import fit
from ssmc.runtime.models.architectures.residual import sites

STEPS = 400
TOKENS_A_STEP = (64, 256)  # at least and at most; between them as many as see every token EPOCHS times
EPOCHS = 8
STRIDE = 0.03  # what an entry of a map moves at most in a step, in units of the mean size of a basis' entries
HELD_OUT = 2048  # tokens that judge the steps, at most
AT_HAND = 16 * 2**20  # numbers of the dense stream held at once


@torch.no_grad()
def best_writes(
    survey: Survey, read: torch.Tensor, write: Sequence[torch.Tensor], cost: torch.Tensor
) -> list[torch.Tensor]:
    """Maps into the narrow stream from which least is lost, all fitted together; those given where none are better.

    Args:
        survey: the dense model and calibration samples, of which some judge the steps on the others; of a single
            sample nothing is learnt.
        read: (D, K) orthonormal columns.
        write: (K, D) for each norm, what becomes of that which was added to the stream since the norm before.
        cost: (S, D, D) Fisher information at the norms, a token.

    Returns:
        (K, D) for each norm.
    """
    length, count = survey.text.shape[1], len(survey.text)
    apart = min(max(1, HELD_OUT // length), max(1, count // 4))
    if count < 2:
        return list(write)
    device = survey.stage.device
    writes, reads = ([_leaf(m, device) for m in maps] for maps in (write, [read] * len(write)))
    moving = [*writes, *reads]
    roots = torch.stack([symmetric_root(matrix) for matrix in cost]).to(device, torch.float32)
    epsilons = _epsilons(survey)
    survey.model.to(device)
    unseen, steps = _stream(survey, survey.text[count - apart :]), _tokens(survey, survey.text[: count - apart])

    def loss(stream: torch.Tensor) -> torch.Tensor:
        found = zip(_narrowed(stream, writes, epsilons), reads, roots, strict=True)
        return torch.stack([((y - z @ a.t()) @ root).square().sum(1).mean() / 2 for (y, z), a, root in found]).sum()

    def gradients() -> list[torch.Tensor]:
        with torch.enable_grad():
            return list(torch.autograd.grad(loss(next(steps)), moving))

    descend(
        moving,
        gradients,
        lambda: float(loss(unseen)),
        Pace(STEPS, [STRIDE / len(read) ** 0.5] * len(moving)),
        survey.progress,
        "what is added to the narrow stream",
    )
    survey.model.cpu()
    return [matrix.detach().double().cpu() for matrix in writes]


def _leaf(matrix: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy that can move."""
    return matrix.to(device, torch.float32).clone().requires_grad_()


@torch.no_grad()
def best_reads(survey: Survey, write: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """(D, K) for each norm: the linear map from the narrow stream, normed, that comes closest to what it puts out.

    The narrow stream is made from what the dense model adds to its own, so these are its least squares: fitted to what
    the narrow model itself computes they would take errors that add up from layer to layer for a reason to read less.

    Args:
        survey: the dense model and calibration samples, of which all are run: a map of D inputs takes many.
        write: (K, D) for each norm, what becomes of that which was added to the stream since the norm before.
    """
    device = survey.stage.device
    survey.model.to(device)
    maps, epsilons = [matrix.to(device) for matrix in write], _epsilons(survey)
    cross = [torch.zeros_like(matrix.t()) for matrix in maps]
    moment = [matrix.new_zeros(len(matrix), len(matrix)) for matrix in maps]
    parts = survey.text.split(max(1, AT_ONCE // survey.text.shape[1]))
    for done, rows in enumerate(parts):
        survey.progress("what reads the narrow stream", done, len(parts))
        for s, (y, z) in enumerate(_narrowed(_stream(survey, rows).double(), maps, epsilons)):
            cross[s] += y.t() @ z
            moment[s] += z.t() @ z
    survey.model.cpu()
    return tuple(fit(*pair).cpu() for pair in zip(cross, moment, strict=True))


def _narrowed(
    stream: torch.Tensor, write: Sequence[torch.Tensor], epsilons: Sequence[float]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(T, D) and (T, K) for each norm: what it puts out without its weight, and the narrow stream, normed.

    Args:
        stream: (S, T, D) what the norms read.
        write: (K, D) each.
        epsilons: of the norms.
    """
    before, narrow = torch.zeros_like(stream[0]), stream.new_zeros(stream.shape[1], len(write[0]))
    for x, matrix, epsilon in zip(stream, write, epsilons, strict=True):
        narrow = narrow + (x - before) @ matrix.t()
        before = x
        mean = narrow.square().sum(1, keepdim=True) / x.shape[1]
        yield x * torch.rsqrt(x.square().mean(1, keepdim=True) + epsilon), narrow * torch.rsqrt(mean + epsilon)


@torch.no_grad()
def _stream(survey: Survey, rows: torch.Tensor) -> torch.Tensor:
    """(S, T, D): what the norms of the dense model read, of (B, L) samples; the model is where it is to run."""
    model, seen = survey.model, list[torch.Tensor]()
    hooks = [
        model.get_submodule(site.norm).register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[0].detach().flatten(0, 1))
        )
        for site in sites(survey.plan.architecture, model)
    ]
    try:
        for some in rows.split(max(1, AT_ONCE // rows.shape[1])):
            model.base_model(some.to(survey.stage.device), use_cache=False)  # type: ignore[operator]
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack([torch.cat(seen[s :: len(hooks)]) for s in range(len(hooks))])


def _tokens(survey: Survey, rows: torch.Tensor) -> Iterator[torch.Tensor]:
    """(S, n, D), without end: the stream of some tokens, each once before any comes again."""
    width = len(sites(survey.plan.architecture, survey.model)) * survey.plan.sizes.d_model
    parts = rows.split(max(1, AT_HAND // width // rows.shape[1]))
    generator = torch.Generator().manual_seed(survey.plan.config.seed)
    least, most = TOKENS_A_STEP
    size = min(most, max(least, EPOCHS * rows.numel() // STEPS))
    stream = None
    while True:
        for part in parts:
            if stream is None or len(parts) > 1:
                stream = _stream(survey, part)
            for index in torch.randperm(stream.shape[1], generator=generator).split(size):
                yield stream[:, index.to(stream.device)]


def _epsilons(survey: Survey) -> list[float]:
    model: Any = survey.model
    return [model.get_submodule(site.norm).variance_epsilon for site in sites(survey.plan.architecture, model)]
