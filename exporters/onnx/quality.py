"""What a graph loses against the model it was made from: perplexity of both on the same text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import torch
import torch.nn.functional as F

from ssmc.exporters.onnx.running import fresh_states, open_written, run
from ssmc.exporters.quality import Quality, quality_of
from ssmc.runtime.measure.perplexity import split_windows
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.progress import Progress

WINDOW, MAX_WINDOWS = 512, 16


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
    return quality_of(text, windows, before, after)


def graph_logits(session: onnxruntime.InferenceSession, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of (B, L) tokens from fresh states, (B, L, V)."""
    return torch.from_numpy(run(session, tokens.numpy(), fresh_states(session, len(tokens)))[0])


def _loss(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    """Mean next-token loss in nats."""
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), tokens[:, 1:].flatten()))
