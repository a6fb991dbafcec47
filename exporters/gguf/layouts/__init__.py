"""What llama.cpp expects of a family: a file each, named as the `model_type`, and those registered from outside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from ssmc.runtime.registry import Registry

__all__ = ["LAYOUTS", "Layout", "adapt", "architecture_name", "own_name"]


class Layout(Protocol):
    """A module with these names, or an object with these members."""

    NAME: str  # of the architecture in llama.cpp, where it is not the name of the file; or a function `name(config)`

    def refusal(self, config: Any, sizes: Any) -> str | None:
        """Why llama.cpp cannot compute a model of this configuration; None where it can."""

    def keys(self, config: Any, sizes: Any) -> dict[str, Any]:
        """Sizes and constants by their keys, without the architecture before each."""

    def entries(self, config: Any, sizes: Any, tensors: Mapping[str, Any]) -> Iterable[Any]:
        """The tensors of the file, `parts.Entry` each."""


def architecture_name(layout: Any, config: Any) -> str:
    """What llama.cpp calls the architecture of a model."""
    if hasattr(layout, "name"):
        return layout.name(config)
    return getattr(layout, "NAME", None) or own_name(layout)


def own_name(layout: Any) -> str:
    """The name of a layout's file: llama.cpp calls most families as transformers does."""
    return layout.__name__.rpartition(".")[2]


def adapt(layout: Any, model: Any) -> str | None:
    """Make a model compute what llama.cpp computes where the two differ, in place.

    Returns:
        How they differ, for people; None where they do not.
    """
    return layout.adapt(model) if hasattr(layout, "adapt") else None


LAYOUTS: Registry[Layout] = Registry(__name__)
"""model_type -> what its file looks like."""
