"""ssmc: make Mamba models smaller and faster, in one shot.

The whole public Python interface; importing it costs nothing, torch is loaded when a name is first used.

    compress       prune a model in one shot and write it, masked, to a folder; or the mixers of a torch module
    export         write a compressed model in a format others load, physically smaller
    benchmark      measure the dense model beside the compressed one
    generate       let a model continue a text, piece by piece
    load           read a model of either format and attach the fast scan
    open_session   read a model to run it token by token: prefill, step, reset
    push           publish an export on the Hugging Face hub, with a model card

Everything that can go wrong is an `ssmc.runtime.errors.SsmcError`.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ssmc.compressor import compress as compress
    from ssmc.exporters import export as export
    from ssmc.exporters.hub import push as push
    from ssmc.runtime.bench import benchmark as benchmark
    from ssmc.runtime.models.generation import generate as generate
    from ssmc.runtime.models.generation import open_session as open_session

__version__ = "0.2.0"
__all__ = ["__version__", "benchmark", "compress", "export", "generate", "load", "open_session", "push"]

_HOMES = {
    "benchmark": "ssmc.runtime.bench",
    "compress": "ssmc.compressor",
    "export": "ssmc.exporters",
    "generate": "ssmc.runtime.models.generation",
    "open_session": "ssmc.runtime.models.generation",
    "push": "ssmc.exporters.hub",
}


def load(
    source: str | Path, dtype: torch.dtype | None = None, fast: bool = True, revision: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read a model and its tokenizer.

    Args:
        source: a transformers or mamba_ssm directory (`compress` and `export` write such), a hub id, or "tiny".
        dtype: of the weights in memory; None keeps what is stored. float32 is the fast one on a CPU.
        revision: of a model of the hub: a branch, a tag or a commit; `owner/name@revision` is the same.
        fast: attach ssmc's scan, so that the model does not loop over tokens in Python.

    Returns:
        transformers' own model, in eval mode, and its tokenizer.

    Raises:
        CheckpointError: there is no model, it is not a Mamba, or its tokenizer is missing.
    """
    from ssmc.runtime.models.checkpoints import load_checkpoint
    from ssmc.runtime.models.checkpoints.sources import at_revision
    from ssmc.runtime.models.fast import use_fast_scan
    from ssmc.runtime.models.tokenizers import load_tokenizer

    checkpoint = load_checkpoint(at_revision(str(source), revision), dtype=dtype, codes=True)
    model = use_fast_scan(checkpoint.model) if fast else checkpoint.model
    return model, load_tokenizer(checkpoint)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value  # so that this function is asked once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
