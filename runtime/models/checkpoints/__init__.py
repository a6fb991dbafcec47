"""Read and write models, in transformers' layout, in mamba_ssm's, and in ssmc's own for packed 2:4 matrices.

Checkpoint        a model in memory that remembers how it was stored
load_checkpoint   read one from a directory, the hub, or the embedded `tiny`
write_checkpoint  write tensors and a configuration into a directory
parameter_count   how many numbers a model has
parameter_counter how many it would have at other sizes
tensor_bytes      how many bytes they take
"""

from ssmc.runtime.models.checkpoints.checkpoint import (
    FORMATS,
    Checkpoint,
    load_checkpoint,
    parameter_count,
    read_dimensions,
    tensor_bytes,
    write_checkpoint,
)
from ssmc.runtime.models.checkpoints.mamba_ssm_format import unpadded_vocab_size
from ssmc.runtime.models.checkpoints.model import parameter_counter
from ssmc.runtime.models.checkpoints.sources import EMBEDDED

__all__ = [
    "EMBEDDED",
    "FORMATS",
    "Checkpoint",
    "load_checkpoint",
    "parameter_count",
    "parameter_counter",
    "read_dimensions",
    "tensor_bytes",
    "unpadded_vocab_size",
    "write_checkpoint",
]
