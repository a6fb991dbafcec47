"""SparseGPT (Frantar & Alistarh 2023): prune a linear layer and let the weights that stay make up for those that go.

`sweep` has the sweep over the columns and its notation. A weight that goes is set to zero, and those to its right
take over its part. Which weights go is decided a span of columns (or a group of N:M) at a time, by the loss
W_ij^2 / F_jj^2 of the weights as they are then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ssmc.compressor.calibration.placement import computing
from ssmc.compressor.methods.weights.masks import lowest_mask, nm_mask, pruned_count
from ssmc.compressor.methods.weights.second_moments import check_finite
from ssmc.compressor.methods.weights.sweep import BLOCK, DAMPING, inverse_factor, sweep, without_dead_inputs
from ssmc.compressor.options.sparsity import NM, Sparsity, check_groups

MOST_SPAN = 128  # columns whose mask is chosen together, at most: the paper's
SPANS = 16  # into how many such spans the inputs are divided at least


@dataclass(frozen=True)
class SparseGPTResult:
    """A pruned weight and what the pruning costs."""

    weight: torch.Tensor  # as given, in float32 (float64 if it came so); rounding to the stored type is the caller's
    mask: torch.Tensor  # boolean, True where kept; the weight is zero elsewhere
    error: float  # squared error of the layer's output over the calibration inputs, relative to its energy
    damping: float  # what was really added to the diagonal of H, in units of its mean


@dataclass(frozen=True)
class MaskRule:
    """How masks are chosen: `decide` gets the losses (out, span) of the columns from `start` on, returns their mask."""

    span: int
    decide: Callable[[torch.Tensor, int], torch.Tensor]


def sparsegpt(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    sparsity: Sparsity,
    *,
    span: int | None = None,
    block: int = BLOCK,
    damping: float = DAMPING,
) -> SparseGPTResult:
    """Prune a linear layer.

    Unstructured: each span of columns loses its share, and the whole matrix exactly round(sparsity * numel). The losses
    of a span are compared before any of it is pruned, as if each weight went alone, which is the poorer the larger a
    part of the inputs the span is. So it is the paper's 128 columns only where there are at least 16 such spans.
    N:M: each group of m columns keeps n per row, decided when its first column is reached.

    Dead inputs (zero on the diagonal of H) get weight zero, as in the paper: the calibration text says nothing about
    them. The mask takes them first; if they are more than it may take, there are more zeros than were asked for.

    Args:
        weight: (out, in), any floating type; not modified.
        hessian: (in, in), `SecondMoment.total` or any positive multiple of it.
        sparsity: sparsity in [0, 1), or an N:M pattern along the inputs.
        span: columns whose mask is chosen together when unstructured; by default a sixteenth, at most 128.
        block: columns updated together, rounded down to whole spans or groups; no matter but of speed and rounding.
        damping: first value tried, in units of H's mean diagonal; 10 times as much each time the factorisation fails.

    Raises:
        UsageError: the sparsity is outside [0, 1), or the inputs are not whole groups.
        CalibrationError: H is not finite, or no damping makes it positive definite.
    """
    if isinstance(sparsity, NM):
        check_groups(weight.shape[1], sparsity)
        rule = MaskRule(sparsity.m, lambda losses, start: nm_mask(losses, sparsity.n, sparsity.m))
    else:
        span = span or default_span(weight.shape[1])
        rule = MaskRule(span, _lowest_share(len(weight), hessian.diagonal() == 0, sparsity))
    return prune_by_rule(weight, hessian, rule, block, damping)


def default_span(inputs: int) -> int:
    """How many columns of an unstructured mask are chosen together in a layer of so many inputs."""
    return max(1, min(MOST_SPAN, inputs // SPANS))


def sparsegpt_a_log(
    A_log: torch.Tensor, hessian: torch.Tensor, sparsity: Sparsity, *, damping: float = DAMPING
) -> SparseGPTResult:
    """The paper's baseline "SparseGPT on A_log": A_log (D, N) treated as a linear map of the hidden state.

    A_log is no linear map of h (it acts through exp(-dt exp(A_log)) h), so its OBS updates have no reason to help; that
    is the point of the comparison. Rows are channels, inputs are states. A pruned entry becomes 0, that is A = -1.

    Args:
        A_log: (D, N).
        hessian: (N, N) sum over samples, time and channels of h h', `StateMoment.total`.
        sparsity: sparsity in [0, 1), or an N:M pattern along the states.
        damping: as `sparsegpt`.
    """
    return sparsegpt(A_log, hessian, sparsity, span=MOST_SPAN, damping=damping)  # all states at once, as the paper


def relative_error(before: torch.Tensor, after: torch.Tensor, hessian: torch.Tensor) -> float:
    """Squared error of the outputs of `after`, relative to the energy of those of `before`; 0 if they have none.

    Args:
        before: (out, in).
        after: (out, in).
        hessian: (in, in) second moment of the inputs, undamped.
    """
    change = after.double() - before.double()
    # the energy has no cancellation: float32, and half the time, is enough for it
    energy = _quadratic(computing(before), hessian)
    return max(0.0, _quadratic(change, hessian)) / energy if energy > 0 else 0.0


def _quadratic(weight: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr(W H W'), in the type of W."""
    return float(((weight @ hessian.to(weight)) * weight).sum(dtype=torch.float64))


def _lowest_share(rows: int, dead: torch.Tensor, sparsity: float) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """Decide by prescribed shares: dead columns (of the mask `dead` (in,)) give what they can, live ones the rest."""
    total = pruned_count(rows * len(dead), sparsity)
    dead_until, live_until = ([0, *part.cumsum(0).tolist()] for part in (dead, ~dead))
    from_dead = min(total, rows * dead_until[-1])

    def until(column: int) -> int:  # running totals in whole numbers, so that no rounding adds up
        of_dead = from_dead * dead_until[column] // max(1, dead_until[-1])
        return of_dead + (total - from_dead) * live_until[column] // max(1, live_until[-1])

    def decide(losses: torch.Tensor, start: int) -> torch.Tensor:
        # dead weights are zero by then, so they are the lowest
        return lowest_mask(losses, until(start + losses.shape[1]) - until(start))

    return decide


def prune_by_rule(
    weight: torch.Tensor, hessian: torch.Tensor, rule: MaskRule, block: int = BLOCK, damping: float = DAMPING
) -> SparseGPTResult:
    """The sweep of SparseGPT over the columns, with masks chosen by a rule. Arguments and errors as `sparsegpt`."""
    inputs = weight.shape[1]
    if hessian.shape != (inputs, inputs):
        raise ValueError(f"the Hessian of {inputs} inputs is {inputs} x {inputs}, not {tuple(hessian.shape)}")
    before = computing(weight.detach())
    H = check_finite(hessian).to(before.device, torch.float64)
    factor, damping = inverse_factor(without_dead_inputs(H), damping)
    # (in, out): what is updated together lies together; a clone, as one row is contiguous either way
    columns = before.t().clone(memory_format=torch.contiguous_format)
    columns[H.diagonal() == 0] = 0
    removing = _Removing(rule, torch.empty_like(columns, dtype=torch.bool))
    sweep(columns, factor.to(columns.dtype), removing, block)
    after = columns.t().contiguous()
    return SparseGPTResult(after, removing.kept.t().contiguous(), relative_error(before, after, H), damping)


@dataclass(frozen=True)
class _Removing:
    """The rule of the sweep: what the mask rule takes becomes zero."""

    masks: MaskRule
    kept: torch.Tensor  # (in, out), filled in as the sweep goes on

    @property
    def span(self) -> int:
        """Columns whose mask is chosen together."""
        return self.masks.span

    def begin(self, columns: torch.Tensor, pivots: torch.Tensor, start: int) -> None:
        """Choose the mask of the next columns."""
        losses = (columns / pivots[:, None]).square()
        self.kept[start : start + len(columns)] = self.masks.decide(losses.t(), start).t()

    def new(self, column: torch.Tensor, number: int) -> torch.Tensor:
        """What stays of a column."""
        return column.masked_fill(~self.kept[number], 0)
