"""Perplexity on a stream of tokens, the way the SparseSSM paper reports it: windows that do not overlap."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ssmc.runtime.collectives import Dealt
from ssmc.runtime.errors import CalibrationError, CheckpointError, UsageError
from ssmc.runtime.measure.losses import IGNORED, best_batch, token_losses, vocab_size
from ssmc.runtime.progress import NO_PROGRESS, Progress

if TYPE_CHECKING:
    from ssmc.runtime.measure.losses import LanguageModel

MIN_TOKENS = 32
"""Fewer tokens than this say nothing about a model."""


@dataclass(frozen=True)
class Perplexity:
    """Mean next-token loss of a model on a text.

    Attributes:
        nll_per_token: mean negative log-likelihood in nats.
        ppl: exp(nll_per_token).
        tokens: how many predictions were scored, (window - 1) per window.
        windows: how many windows were run, each from a fresh state.
        window: tokens of one window; smaller than asked for when the text is shorter than that.
        stderr: standard error of nll_per_token over windows; None for a single window.
        window_nll: mean loss of every window in order, so that two models can be compared window by window.
    """

    nll_per_token: float
    ppl: float
    tokens: int
    windows: int
    window: int
    stderr: float | None
    window_nll: tuple[float, ...]


@dataclass(frozen=True)
class ExcessLoss:
    """What a model loses against another on the same windows, in nats per token; `stderr` is over paired windows."""

    nats: float
    stderr: float | None


def perplexity(
    model: LanguageModel, tokens: torch.Tensor, window: int, batch: int = 1, progress: Progress = NO_PROGRESS
) -> Perplexity:
    """Score a stream of tokens in windows that do not overlap, each run from a fresh state.

    The window - 1 next-token predictions inside a window are scored, in float32; tokens after the last whole window
    are left out. A text shorter than one window is scored as one window of its own length.

    Args:
        model: a causal language model of transformers in eval mode, or the session of an ONNX export.
        tokens: (T,) int64, the whole text as one stream.
        window: tokens per window, at least 2.
        batch: windows run at once; changes the speed, not the result.
        progress: told after every batch.

    Raises:
        UsageError: window or batch make no sense.
        CalibrationError: too few tokens, or tokens the model has no embedding for.
        CheckpointError: the model's loss is not a number.
    """
    windows, losses = losses_of_tokens(model, tokens, window, batch, progress)
    return summarise(windows, losses)


def losses_of_tokens(
    model: LanguageModel, tokens: torch.Tensor, window: int, batch: int = 1, progress: Progress = NO_PROGRESS
) -> tuple[torch.Tensor, torch.Tensor]:
    """The windows a text is scored in, (W, window), and the loss of every prediction in them, (W, window - 1) float64.

    Several processes that are joined score a share of the windows each, and all have all losses.

    Args and errors: as `perplexity`.
    """
    if batch < 1:
        raise UsageError(f"Perplexity needs a batch of at least 1, not {batch}.")
    windows = split_windows(model, tokens, window)  # (W, window)
    dealt = Dealt(len(windows), best_batch(model, batch))
    losses = [torch.empty(0, windows.shape[1] - 1, dtype=torch.float64)]
    for rows in dealt.own:
        losses.append(_losses(model, windows[rows]))
        progress("perplexity", rows.stop, len(windows))
    found = dealt.together(torch.cat(losses))
    if not bool(found.isfinite().all()):
        raise CheckpointError(
            "The model's loss on this text is not a finite number, so its perplexity is undefined. "
            "Its weights or its dtype overflow: try float32, or check the checkpoint."
        )
    return windows, found


def summarise(windows: torch.Tensor, losses: torch.Tensor) -> Perplexity:
    """The perplexity of what `losses_of_tokens` returns."""
    each = (losses.sum(dim=1) / losses.shape[1]).tolist()
    mean, stderr = mean_and_stderr(each)
    return Perplexity(
        nll_per_token=mean,
        ppl=math.exp(mean) if mean < 700 else math.inf,  # exp(710) is beyond float64
        tokens=losses.numel(),
        windows=windows.shape[0],
        window=windows.shape[1],
        stderr=stderr,
        window_nll=tuple(each),
    )


def excess_loss(model: Perplexity, dense: Perplexity) -> ExcessLoss:
    """Loss of `model` above that of `dense` on the same windows; negative where it predicts better.

    Pairing takes the differences between texts out of the standard error: what is left is how unevenly the loss falls.
    """
    if (model.windows, model.window) != (dense.windows, dense.window):
        raise ValueError("the two perplexities were measured on different windows")
    differences = [ours - theirs for ours, theirs in zip(model.window_nll, dense.window_nll, strict=True)]
    return ExcessLoss(*mean_and_stderr(differences))


def mean_and_stderr(values: list[float]) -> tuple[float, float | None]:
    """Mean and its standard error (sample deviation over sqrt(n)); the latter is None for a single value."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def split_windows(model: LanguageModel, tokens: torch.Tensor, window: int) -> torch.Tensor:
    """The stream (T,) cut into windows, (W, window), if `model` can be scored on them.

    Raises:
        UsageError, CalibrationError: as `perplexity`, but at once.
    """
    if window < 2:
        raise UsageError(f"Perplexity needs windows of at least 2 tokens, not {window}.")
    total = tokens.numel()
    if total < min(window, MIN_TOKENS):
        raise CalibrationError(
            f"The evaluation text has {total} tokens, too few to measure perplexity on (at least {MIN_TOKENS}). "
            "Give a longer text."
        )
    vocabulary = vocab_size(model)
    if int(tokens.max()) >= vocabulary or int(tokens.min()) < 0:
        raise CalibrationError(
            f"The evaluation text has token id {int(tokens.max())}, the model's vocabulary ends at {vocabulary - 1}: "
            "the tokenizer belongs to another model. Name the right one."
        )
    width = min(window, total)
    return tokens[: total // width * width].view(-1, width)


def _losses(model: LanguageModel, windows: torch.Tensor) -> torch.Tensor:
    """The loss of every prediction in windows (B, L), (B, L - 1) in nats."""
    targets = F.pad(windows[:, 1:], (0, 1), value=IGNORED)
    return token_losses(model, windows, targets)[0][:, :-1]
