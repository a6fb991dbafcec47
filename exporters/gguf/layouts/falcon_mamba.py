"""Falcon-Mamba in llama.cpp: a Mamba-1 with norms without weights on dt, B and C."""

from __future__ import annotations

from typing import Any

from ssmc.exporters.gguf import parts
from ssmc.exporters.gguf.layouts import mamba, own_name

NAME = own_name(mamba)


def refusal(config: Any, sizes: Any) -> str | None:
    """As a Mamba-1, and all norms have one epsilon."""
    if config.mixer_rms_eps != config.layer_norm_epsilon:
        return (
            f"llama.cpp has one epsilon for all norms; here are {config.layer_norm_epsilon} and {config.mixer_rms_eps}"
        )
    return mamba.refusal(config, sizes)


def keys(config: Any, sizes: Any) -> parts.Keys:
    """Sizes and constants."""
    return mamba.keys(config, sizes) | {"ssm.dt_b_c_rms": True}


entries = mamba.entries
