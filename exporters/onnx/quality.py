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
from ssmc.runtime.models.generation.onnx_graph import TYPES
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
    rounds = any(TYPES[past.type][0] != torch.float32 for past in session.get_inputs() if past.name.startswith("past_"))
    before, after = [], []
    for done, window in enumerate(windows.split(len(windows) if rounds else 1)):
        progress("perplexity before and after", done, len(windows))
        with torch.inference_mode():
            before += [_loss(model(row[None], use_cache=False).logits, row[None]) for row in window]
        after += _stepped(session, window) if rounds else [_loss(graph_logits(session, window), window)]
    return quality_of(text, windows, before, after)


def graph_logits(session: onnxruntime.InferenceSession, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of (B, L) tokens from fresh states, (B, L, V)."""
    return torch.from_numpy(run(session, tokens.numpy(), fresh_states(session, len(tokens)))[0])


def _stepped(session: onnxruntime.InferenceSession, windows: torch.Tensor) -> list[float]:
    """Losses of windows (W, L) that are read token by token, so that states are rounded after every one."""
    states, losses = fresh_states(session, len(windows)), torch.zeros(len(windows), dtype=torch.float64)
    for t in range(windows.shape[1] - 1):
        logits, states = run(session, windows[:, t : t + 1].numpy(), states)
        losses += F.cross_entropy(torch.from_numpy(logits[:, 0]).double(), windows[:, t + 1], reduction="none")
    return (losses / (windows.shape[1] - 1)).tolist()


def _loss(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    """Mean next-token loss in nats."""
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), tokens[:, 1:].flatten()))
