"""What the scripts of this folder have in common: each runs in the environment of one consumer and answers requests.

A script is started as `python SCRIPT FOLDER THREADS`. It loads the export in that folder, writes one JSON line with the
versions of what it imported, and then answers one line for each line it reads. It knows nothing of ssmc.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Model(Protocol):
    """An export that a consumer has loaded."""

    def read(self, tokens: Sequence[int]) -> np.ndarray:
        """Read tokens from a fresh state; (V,) logits or log probabilities of what follows the last."""

    def steps(self, tokens: Sequence[int]) -> Sequence[np.ndarray]:
        """Read more tokens one by one; the same of what follows each."""


def serve(load: Callable[[Path, int], Model], packages: Sequence[str], values: str = "logits") -> None:
    """Load and answer until there are no more requests.

    Args:
        load: given the folder and the number of threads.
        packages: whose versions are told.
        values: "logits" or "log probabilities", as the consumer gives.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    answers: dict[str, Callable[..., Any]] = {"logits": logits, "time": take_time}
    try:
        model = load(Path(sys.argv[1]), int(sys.argv[2]))
        reply = {"values": values, "versions": {name: version_of(name) for name in packages}}
    except Exception as error:  # whatever a consumer raises is what the driver wants to know
        reply = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(reply), file=out, flush=True)
    if "error" in reply:
        return
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = answers[request.pop("call")](model, **request)
        except Exception as error:  # as above
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=out, flush=True)


def version_of(package: str) -> str:
    """Of a package; what was built by hand may have no metadata."""
    try:
        return version(package)
    except PackageNotFoundError:
        return import_module(package.replace("-", "_")).__version__


def logits(model: Model, tokens: list[int], lengths: list[int], first: int, path: str) -> dict[str, Any]:
    """Write `whole` (len(lengths), V), of prompts read at once, and `stepped` (L - first, V), one by one."""
    whole = np.stack([row(model.read(tokens[:length])) for length in lengths])
    model.read(tokens[:first])
    stepped = np.stack([row(values) for values in model.steps(tokens[first:])])
    np.savez(path, whole=whole, stepped=stepped)
    return {}


def take_time(model: Model, tokens: list[int], new: int, processor: bool = False) -> dict[str, float]:
    """Seconds to read the tokens at once ("prefill") and, the mean of `new`, of one more ("decode").

    Args:
        model: asked.
        tokens: of the prompt.
        new: tokens behind it.
        processor: seconds of processor time of the whole process, which other work on the machine disturbs less.
    """
    now = time.process_time if processor else time.perf_counter
    own = getattr(model, "timed", None)
    if own is not None:  # by the consumer's own clock, or within one generation
        return own(tokens, new, now)
    begin = now()
    model.read(tokens)
    prefill = now() - begin
    begin = now()
    model.steps(tokens[:new])
    return {"prefill": prefill, "decode": (now() - begin) / new}


def row(values: np.ndarray) -> np.ndarray:
    """(V,) float32."""
    return np.asarray(values, np.float32).reshape(-1)
