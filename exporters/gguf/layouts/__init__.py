"""What a family's file looks like to llama.cpp: a file each, named as the `model_type`, and those registered from outside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from ssmc.runtime.registry import Registry

__all__ = ["LAYOUTS", "Layout"]


class Layout(Protocol):
    """A module with these names, or an object with these members."""

    NAME: str  # of the architecture in llama.cpp

    def refusal(self, config: Any, sizes: Any) -> str | None:
        """Why llama.cpp cannot compute a model of this configuration; None where it can."""

    def keys(self, config: Any, sizes: Any) -> dict[str, Any]:
        """Sizes and constants by their keys, without the architecture before each."""

    def entries(self, config: Any, sizes: Any, tensors: Mapping[str, Any]) -> Iterable[Any]:
        """The tensors of the file, `parts.Entry` each."""


LAYOUTS: Registry[Layout] = Registry(__name__)
"""model_type -> what its file looks like."""
