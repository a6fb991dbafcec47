"""What a graph loses against the model it was made from: perplexity of both on the same text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import torch.nn.functional as F

from ssmc.exporters.onnx.running import fresh_states, open_written, run
from ssmc.runtime.errors import VerificationError
from ssmc.runtime.measure.perplexity import mean_and_stderr, split_windows
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.progress import Progress

WINDOW, MAX_WINDOWS = 512, 16
MOST_LOST = 0.5  # nats a token: a graph that loses more is broken, not rounded


@dataclass(frozen=True)
class Quality:
    """Perplexity before and after, on the same windows.

    Attributes:
        text: where it came from.
        tokens: predictions scored.
        ppl_before: of the model in torch, float32.
        ppl_after: of the graph.
        excess_nats: loss of the graph above the model's, nats a token.
        excess_stderr: its standard error over windows; None for one window.
    """

    text: str
    tokens: int
    ppl_before: float
    ppl_after: float
    excess_nats: float
    excess_stderr: float | None


def measure(model: Any, folder: Path, stream: torch.Tensor, text: str, progress: Progress) -> Quality:
    """Score a stream of tokens (T,) by a model and by the graph in a folder, window by window from fresh states.

    Raises:
        VerificationError: the graph loses more than MOST_LOST.
        CalibrationError: too few tokens, or not of this vocabulary.
    """
    windows = split_windows(model, stream, WINDOW)[:MAX_WINDOWS]
    session = open_written(folder, all_logits=True)
    use_fast_scan(model)
    before, after = [], []
    for done, window in enumerate(windows.split(1)):
        progress("perplexity before and after", done, len(windows))
        with torch.inference_mode():
            before.append(_loss(model(window, use_cache=False).logits, window))
        after.append(_loss(graph_logits(session, window), window))
    excess, stderr = mean_and_stderr([b - a for a, b in zip(before, after, strict=True)])
    if not excess <= MOST_LOST:  # also when it is NaN
        raise VerificationError(
            f"The graph loses {excess:.3g} nats a token on {text} against the model (allowed {MOST_LOST}), so nothing "
            "was written. These weights do not take this dtype or quantisation: export without."
        )
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    return Quality(text, tokens, _ppl(before), _ppl(after), excess, stderr)


def graph_logits(session: onnxruntime.InferenceSession, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of (B, L) tokens from fresh states, (B, L, V)."""
    return torch.from_numpy(run(session, tokens.numpy(), fresh_states(session, len(tokens)))[0])


def _loss(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    """Mean next-token loss in nats."""
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), tokens[:, 1:].flatten()))


def _ppl(losses: list[float]) -> float:
    return float(torch.tensor(losses, dtype=torch.float64).mean().exp())
