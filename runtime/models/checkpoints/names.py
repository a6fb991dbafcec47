"""Names that files give to tensors and models do not: of wrappers around a model, and of a part of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from ssmc.runtime.models.families import Architecture

_WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch.compile, FSDP and activation checkpointing put into names, wherever they wrap a module."""


def model_names(
    stored: dict[str, torch.Tensor], architecture: Architecture, config: PretrainedConfig
) -> tuple[dict[str, torch.Tensor], str | None]:
    """Tensors by the model's names, whatever was wrapped around it when it was saved.

    Names of wrappers are taken out, prefixes that all names have are taken away, and the prefix of the model's body is
    put before names that have none, as those of a body saved alone; whichever gives the model its embedding.

    Args:
        stored: by the names in the files.
        architecture: of the model.
        config: of the model.

    Returns:
        The tensors, and what was done to the names in a sentence. Where nothing helps, the names stay as they are.
    """
    tensors = architecture.from_stored(stored)
    if architecture.embedding in tensors and not any(map(_WRAPPERS.search, stored)):
        return tensors, None
    body = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].base_model_prefix + "."
    for names, gone in _stripped(dict.fromkeys(stored)):
        for added in ("", body):
            renamed = {(new if new.startswith("lm_head.") else added + new): stored[old] for old, new in names.items()}
            found = architecture.from_stored(renamed)
            if len(renamed) == len(stored) and architecture.embedding in found:
                return found, _note(gone, added)
    return tensors, None


def _stripped(names: Mapping[str, None]) -> Iterator[tuple[dict[str, str], str]]:
    """Old names and new ones, with less and less before them, and what is gone."""
    found = {name: _WRAPPERS.sub("", name) for name in names}
    wrappers = sorted({match for name in names for match in _WRAPPERS.findall(name)})
    gone = "".join(wrappers)
    yield found, gone
    while len({new.split(".")[0] for new in found.values()}) == 1:
        first = next(iter(found.values())).split(".")[0] + "."
        if not all(new.startswith(first) and new != first for new in found.values()):
            return
        found, gone = {old: new.removeprefix(first) for old, new in found.items()}, gone + first
        yield found, gone


def _note(gone: str, added: str) -> str:
    """What was done to the names."""
    done = [f"without {gone!r}, which whatever was wrapped around the model left in them"] if gone else []
    done += [f"with {added!r} before them, as the body of the model was saved alone"] if added else []
    return f"The names of its tensors are read {' and '.join(done)}."
