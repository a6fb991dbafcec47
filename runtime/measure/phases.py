"""The two phases of a language model that are timed, in words; imports nothing, so that options can use it."""

from __future__ import annotations

PHASES = ("prefill", "decode")


def workload_text(phase: str, batch: int, length: int) -> str:
    """What is timed, as it is printed: "a prefill of 512 tokens at batch 1"."""
    what = "a step of decoding" if phase == "decode" else f"a prefill of {length} tokens"
    return f"{what} at batch {batch}"
