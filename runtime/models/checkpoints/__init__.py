"""Read and write models, in transformers' layout, in mamba_ssm's, and in ssmc's own for packed 2:4 matrices.

Checkpoint        a model in memory that remembers how it was stored
load_checkpoint   read one from a directory, the hub, or the embedded `tiny`
write_checkpoint  write tensors and a configuration into a directory
parameter_count   how many numbers a model has
parameter_counter how many it would have at other sizes
tensor_bytes      how many bytes they take
"""

from __future__ import annotations

from typing import Any

from ssmc.runtime import lazy

_HOMES = lazy.homes(
    {
        "ssmc.runtime.models.checkpoints.checkpoint": (
            "FORMATS Checkpoint Written load_checkpoint parameter_count read_description read_dimensions tensor_bytes "
            "write_checkpoint"
        ),
        "ssmc.runtime.models.checkpoints.mamba_ssm_format": "unpadded_vocab_size",
        "ssmc.runtime.models.checkpoints.model": "parameter_counter",
        "ssmc.runtime.models.checkpoints.sources": "EMBEDDED",
    }
)
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    return lazy.fetch(__name__, _HOMES, name)
