"""The proof that a written graph computes what the model computes, in every way it can be run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnxruntime
import torch

from ssmc.exporters.onnx.running import fresh_states, run
from ssmc.exporters.verify import Comparison, Way, expected
from ssmc.runtime.errors import VerificationError
from ssmc.runtime.models.fast import use_fast_scan

DECODED = 64  # tokens given one by one
PIECES = (1, 2, 3)  # lengths of the first pieces of a split prompt, shorter than a convolution; then the rest


@torch.no_grad()
def prove(
    model: Any, session: onnxruntime.InferenceSession, tokens: torch.Tensor, real_text: bool
) -> tuple[Comparison, list[Way]]:
    """Run a float32 graph and the model it was made from on the same tokens: at once, in pieces, one by one, padded.

    The tolerance comes from the model itself, as in `exporters.verify.compare`: how far its logits move when torch
    takes the same sums in another order. Tokens are given to the graph, never chosen by it.

    Args:
        model: transformers' model, float32, of the original or the smaller shape.
        session: of the graph.
        tokens: (B, L), L above DECODED + the sum of PIECES.
        real_text: whether they are text.

    Raises:
        VerificationError: the logits differ by more than rounding.
    """
    reference, tolerance = expected(model, tokens)
    scale = float(reference.abs().max())
    ways = _run(session, tokens, reference)
    worst = max(ways, key=lambda way: way.max_difference)
    if not worst.max_difference <= tolerance:
        raise VerificationError(
            f"The graph's logits differ from the model's by {worst.max_difference:.3g} ({worst.name}; allowed "
            f"{tolerance:.3g}), so nothing was written. This is a bug in ssmc; please report it with the model's sizes."
        )
    return Comparison(worst.max_difference, tolerance, scale, tokens.numel(), real_text), ways


@torch.no_grad()
def differences(model: Any, session: onnxruntime.InferenceSession, tokens: torch.Tensor) -> list[Way]:
    """How far the logits of a float16 or int8 graph are from the model's, in the same ways.

    Raises:
        VerificationError: they are not numbers.
    """
    ways = _run(session, tokens, use_fast_scan(model)(tokens).logits)
    if any(math.isinf(way.max_difference) for way in ways):
        raise VerificationError(
            "The graph's logits are not finite numbers, so nothing was written: these weights overflow the dtype. "
            "Export in float32."
        )
    return ways


def _run(session: onnxruntime.InferenceSession, tokens: torch.Tensor, reference: torch.Tensor) -> list[Way]:
    """All ways; a difference that is no number counts as infinite."""
    found = _ways(session, tokens.numpy(), reference.numpy())
    return [Way(name, difference if math.isfinite(difference) else math.inf) for name, difference in found]


def _ways(session: onnxruntime.InferenceSession, ids: np.ndarray, reference: np.ndarray) -> Iterator[tuple[str, float]]:
    """Run the graph in every way; the name and the largest difference of a logit of each."""
    batch, length = ids.shape
    prompt = length - DECODED

    def difference(logits: np.ndarray, end: int) -> float:
        """Of the logits that stand at the end of `logits`, to those of the reference before token `end`."""
        return float(np.abs(logits - reference[:, end - logits.shape[1] : end]).max())

    logits, carried = run(session, ids[:, :prompt], fresh_states(session, batch))
    yield "prefill", difference(logits, prompt)
    found, end, pieces = [], 0, fresh_states(session, batch)
    for piece in (*PIECES, prompt - sum(PIECES)):
        logits, pieces = run(session, ids[:, end : end + piece], pieces)
        end += piece
        found.append(difference(logits, end))
    yield "split prefill", max(found)
    found = []
    for end in range(prompt + 1, length + 1):
        logits, carried = run(session, ids[:, end - 1 : end], carried)
        found.append(difference(logits, end))
    yield f"{DECODED} decode steps", max(found)
    yield "padded", _padded(session, ids[:, :prompt], reference)


def _padded(session: onnxruntime.InferenceSession, ids: np.ndarray, reference: np.ndarray) -> float:
    """Rows of different lengths, padded left, right and in the middle, then one token more: the largest difference."""
    worst = 0.0
    for place in ("left", "right", "middle"):
        mask = np.ones_like(ids)
        counts = []
        for row in range(len(ids)):
            padding = min(2 + 3 * row, ids.shape[1] - 2)
            start = {"left": 0, "right": ids.shape[1] - padding, "middle": 1}[place]
            mask[row, start : start + padding] = 0
            counts.append(int(mask[row].sum()))
        given = np.zeros_like(ids)
        for row, count in enumerate(counts):
            given[row, mask[row] == 1] = ids[row, :count]
        logits, after = run(session, given, fresh_states(session, len(ids)), mask)
        more, _ = run(session, np.stack([ids[row, count : count + 1] for row, count in enumerate(counts)]), after)
        for row, count in enumerate(counts):
            real = logits[row][mask[row] == 1] if logits.shape[1] > 1 else logits[row]
            worst = max(worst, float(np.abs(real - reference[row, count - len(real) : count]).max()))
            worst = max(worst, float(np.abs(more[row] - reference[row, count : count + 1]).max()))
    return worst
