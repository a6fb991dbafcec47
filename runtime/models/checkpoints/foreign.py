"""Tensors that are no weights of a model: what quantisation stores beside codes, and adapters that were not merged."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ssmc.runtime.errors import CheckpointError

_ADAPTER = "an adapter"
_KINDS = {
    _ADAPTER: r"\.(?:lora_\w+|base_layer|ia3_\w+|hada_\w+|lokr_\w+|oft_\w+|boft_\w+|vera_\w+)(?:\.|$)",
    "bitsandbytes": r"\.(?:absmax|nested_absmax|quant_map|nested_quant_map|quant_state\.[\w.]+|SCB)$",
    "GPTQ or AWQ": r"\.(?:qweight|qzeros|g_idx)$",
    "compressed-tensors": r"\.weight_(?:packed|shape|zero_point)$",
    "numbers of 8 bits with scales": r"\.(?:weight_scale|weight_scale_inv|input_scale)$",
    "MXFP4": r"_(?:blocks|scales)$",
}
"""Who writes such tensors -> how their names end."""


def foreign(names: Iterable[str]) -> tuple[str, str] | None:
    """Who wrote tensors that no model has, and the name of one; None where all may be weights."""
    names = sorted(names)
    for kind, pattern in _KINDS.items():
        if found := next((name for name in names if re.search(pattern, name)), None):
            return kind, found
    return None


def refuse_foreign(names: Iterable[str], where: str) -> None:
    """Refuse a model whose files hold adapters beside weights, or codes in their place.

    Raises:
        CheckpointError: saying which, and what to take.
    """
    found = foreign(names)
    if found is None:
        return
    kind, name = found
    if kind == _ADAPTER:
        raise CheckpointError(
            f"{where} holds an adapter that was not merged into its weights ({name}). Merge it (peft: "
            "merge_and_unload, then save_pretrained) and name the folder with the result."
        )
    raise CheckpointError(
        f"{where} is quantised by {kind}, say the names of its tensors ({name}): its files hold codes, not weights "
        "that could be pruned. Name the full-precision model it was made from, and quantise what ssmc writes."
    )
