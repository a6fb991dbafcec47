"""The model families ssmc knows: a file each, named as its `model_type`, and those registered from outside.

A file of this folder offers its family as `FAMILY` and is found by its name; nothing else has to know of it.
`register_family` adds one from anywhere; an installed package does so when an entry point of the group `ssmc.families`,
named as the `model_type`, is loaded.
"""

from __future__ import annotations

from ssmc.runtime.errors import CheckpointError
from ssmc.runtime.models.architectures.alone import LoneMixer
from ssmc.runtime.models.architectures.capabilities import BLOCK, Capabilities
from ssmc.runtime.models.architectures.dimensions import Dimensions
from ssmc.runtime.models.architectures.interface import Architecture, Readers
from ssmc.runtime.models.architectures.plan import CHANNEL, HEAD, STATE, Cut
from ssmc.runtime.registry import Registry

__all__ = [
    "BLOCK",
    "CHANNEL",
    "HEAD",
    "STATE",
    "Architecture",
    "Capabilities",
    "Cut",
    "Dimensions",
    "Readers",
    "architecture_for",
    "families",
    "find_family",
    "lone_mixers",
    "model_types",
    "register_family",
]

_FAMILIES: Registry[Architecture] = Registry(__name__, "FAMILY", group="ssmc.families")
_ALONE: Registry[LoneMixer] = Registry(__name__, "ALONE")


def register_family(family: Architecture, alone: LoneMixer | None = None) -> Architecture:
    """Add a family from outside the package; it is known by its `model_type` from then on.

    transformers must know the model itself (its `AutoConfig.register` and `AutoModelForCausalLM.register`).

    Args:
        family: see `Architecture`; `ssmc.runtime.models.architectures` has what most families are made of.
        alone: its mixers where they sit in other modules than language models, if they can be known by their
            parameters.

    Returns:
        The same family.

    Raises:
        ValueError: a family of this package has that `model_type`.
    """
    _FAMILIES.register(family.model_type, family)
    if alone is not None:
        _ALONE.register(family.model_type, alone)
    return family


def find_family(model_type: str | None) -> Architecture | None:
    """The family of that name, or None where ssmc knows none."""
    return _FAMILIES.find(model_type)


def model_types() -> tuple[str, ...]:
    """The names of all families, sorted."""
    return _FAMILIES.names()


def families() -> tuple[Architecture, ...]:
    """All families, sorted by name."""
    return _FAMILIES.all()


def lone_mixers() -> tuple[LoneMixer, ...]:
    """The families whose mixers are known by their parameters, wherever they sit, sorted by name."""
    return _ALONE.all()


def architecture_for(model_type: str | None, where: str = "this model") -> Architecture:
    """The family of a model.

    Args:
        model_type: as in a transformers config.json.
        where: what to call the model in the error.

    Raises:
        CheckpointError: ssmc does not know this family.
    """
    if (family := find_family(model_type)) is not None:
        return family
    raise CheckpointError(
        f"{where} is not a model ssmc can compress: its config.json says model_type {model_type!r}, "
        f"ssmc knows {', '.join(model_types())}. Point it at a Mamba checkpoint."
    )
