"""What an error in the residual stream costs the predictions of the whole model, behind each layer.

Behind layer l the Fisher information of the stream is F_l = E[g g'], g the gradient of the log-likelihood of a token
drawn from the model's own predictions (Amari 1998). For a small error e of the stream, e' F_l e / 2 is the divergence
of the predictions, to second order and where the errors of different tokens are independent. So ||F^(1/2) W y||^2
measures what `obs` measures by ||W y||^2, in the unit that counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from ssmc.compressor.methods.gradients import only_these_move
from ssmc.compressor.methods.method import Survey
from ssmc.runtime.measure.losses import LOGITS_AT_ONCE

TOKENS = 16384  # that it is measured on, at most
AT_ONCE = 2048  # tokens of one pass, in whole samples
FLOOR = 1e-6  # of the largest eigenvalue: no direction is free


@torch.enable_grad()
def stream_roots(survey: Survey) -> list[torch.Tensor]:
    """F^(1/2) (d_model, d_model), symmetric, float64, behind every block of the dense model.

    Args:
        survey: the dense model and calibration samples.
    """
    model, device = survey.model.to(survey.stage.device), survey.stage.device
    head = model.get_output_embeddings().weight
    blocks = len(survey.plan.architecture.blocks(model))
    sums = [torch.zeros(head.shape[1], head.shape[1], dtype=torch.float64, device=device) for _ in range(blocks)]
    tokens = survey.text[: -(-TOKENS // survey.text.shape[1])]
    generator = torch.Generator().manual_seed(survey.plan.config.seed)
    with only_these_move((), model), _watched(survey) as outputs:
        for done, rows in enumerate(parts := tokens.split(max(1, AT_ONCE // tokens.shape[1]))):
            survey.progress("what errors cost the predictions", done, len(parts))
            backward_of_drawn(survey, rows.to(device), generator)
            for total, output in zip(sums, outputs, strict=True):
                g = output.grad.flatten(0, 1).double()  # (T, d_model)
                total += g.t() @ g
            outputs.clear()
    model.cpu()
    return [symmetric_root(total / tokens.numel(), FLOOR).cpu() for total in sums]


@contextmanager
def _watched(survey: Survey) -> Iterator[list[Any]]:
    """A list that the blocks' outputs of a pass are put in; they keep their gradients."""
    outputs: list[Any] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        stream = output[0] if isinstance(output, tuple) else output
        stream.retain_grad()
        outputs.append(stream)

    blocks = survey.plan.architecture.blocks(survey.model)
    start = survey.model.get_input_embeddings().register_forward_hook(lambda _, __, out: out.detach().requires_grad_())
    hooks = [start, *(block.register_forward_hook(keep) for block in blocks)]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def backward_of_drawn(survey: Survey, rows: torch.Tensor, generator: torch.Generator) -> None:
    """Gradients of the log-likelihood of one drawn token behind each token of (B, L) rows, added up."""
    architecture, model = survey.plan.architecture, survey.model
    hidden = model.base_model(rows, use_cache=False)[0]  # (B, L, d_model)
    leaf = hidden.detach().requires_grad_()
    for part in leaf.flatten(0, 1).split(max(1, LOGITS_AT_ONCE // model.get_output_embeddings().weight.shape[0])):
        logits = architecture.logits(model, part[None])[0].float()
        drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
        F.cross_entropy(logits, drawn.to(logits.device), reduction="sum").backward()
    hidden.backward(leaf.grad)


def symmetric_root(matrix: torch.Tensor, floor: float = 0.0) -> torch.Tensor:
    """The symmetric root of a second moment (n, n); eigenvalues are at least `floor` of the largest."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=floor * float(values[-1])).sqrt()) @ vectors.t()
