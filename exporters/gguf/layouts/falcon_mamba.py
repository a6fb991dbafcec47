"""Falcon-Mamba in llama.cpp: a Mamba-1 with norms without weights on dt, B and C.

llama.cpp has one epsilon for all norms, and these have another than those of the residual stream: 1e-6 beside 1e-5 in
the published models. x / sqrt(mean(x^2) + e) is k x / sqrt(mean((k x)^2) + k^2 e), so x_proj takes the factor k that
makes k^2 e the one epsilon.
"""

from __future__ import annotations

import math
from typing import Any

from ssmc.exporters.gguf import parts
from ssmc.exporters.gguf.layouts import mamba, own_name

NAME = own_name(mamba)
refusal = mamba.refusal


def keys(config: Any, sizes: Any) -> parts.Keys:
    """Sizes and constants."""
    return mamba.keys(config, sizes) | {"ssm.dt_b_c_rms": True}


def entries(config: Any, sizes: Any, tensors: parts.Tensors) -> parts.Entries:
    """All tensors, x_proj scaled so that the norms behind it have their own epsilon."""
    factor = math.sqrt(config.layer_norm_epsilon / config.mixer_rms_eps)
    return mamba.entries(config, sizes, tensors, factor)
