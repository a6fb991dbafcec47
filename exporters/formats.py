"""Which export formats a model family has, and why it lacks the others."""

from __future__ import annotations

from ssmc.exporters.sparse24 import FORMAT as SPARSE24
from ssmc.runtime.errors import UsageError

_OF_MAMBA = ("mamba", "mamba2")  # families with a layout of mamba_ssm's own; their graphs are `onnx.graph.LAYERS`


def missing_formats(model_type: str, hybrid: bool = False) -> dict[str, str]:
    """The formats a family cannot be exported to, with the reason.

    Args:
        model_type: as in a transformers config.json.
        hybrid: whether the family has more than state-space mixers.
    """
    if model_type in _OF_MAMBA:
        return {}
    missing = {
        "mamba-ssm": f"mamba_ssm has no models of type {model_type}",
        "onnx": f"there is no graph for models of type {model_type}",
    }
    if hybrid:
        missing[SPARSE24] = "it knows the modules of state-space mixers alone"
    return missing


def check_format(format: str, model_type: str, hybrid: bool) -> None:
    """Refuse a format that a family has not.

    Raises:
        UsageError: with the reason.
    """
    if reason := missing_formats(model_type, hybrid).get(format):
        raise UsageError(f"There is no export to {format} for this model: {reason}. Use --format safetensors.")
