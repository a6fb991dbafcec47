"""What a run quantised, as the manifest and the file of codes have it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ssmc.compressor.methods.method import Outcome
from ssmc.compressor.methods.quantize.modules import QuantizedModule
from ssmc.compressor.options.quantization import BITS
from ssmc.runtime.quantized import Quantized


def packed(outcome: Outcome) -> dict[str, Quantized]:
    """The codes of all weights that are in few bits, by the names of their tensors."""
    return {module.tensor: module.stored for module in _modules(outcome) if module.stored is not None}


def summary(outcome: Outcome, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any] | None:
    """The entry of the manifest; None where nothing was quantised.

    Args:
        outcome: of the run.
        tensors: of the masked model, by name.
    """
    config, codes = outcome.plan.config, packed(outcome)
    if config.quantize is None:
        return None
    rest = sum(tensor.numel() * tensor.element_size() for name, tensor in tensors.items() if name not in codes)
    return {
        "bits": BITS[config.quantize],
        "group_size": config.group_size,
        "symmetric": config.symmetric,
        "method": config.quantize_method,
        "weights": sum(weight.codes.numel() for weight in codes.values()),
        "packed_bytes": sum(weight.packed_bits for weight in codes.values()) // 8,
        "other_bytes": rest,
        "outside": [module.as_manifest() for record in outcome.outside for module in getattr(record, "modules", ())],
    }


def _modules(outcome: Outcome) -> Iterator[QuantizedModule]:
    for record in outcome.outside:
        yield from getattr(record, "modules", ())
    for layer in outcome.layers:
        if layer.quantized is not None:
            yield from layer.quantized.modules
