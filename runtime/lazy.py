"""Names that a package offers, imported when they are first used: torch and transformers take seconds to import."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any


def homes(modules: Mapping[str, str]) -> dict[str, str]:
    """The module of every name, from the names of every module.

    Args:
        modules: full name of a module -> the names it defines, with spaces between.
    """
    return {name: module for module, names in modules.items() for name in names.split()}


def fetch(package: str, homes: Mapping[str, str], name: str) -> Any:
    """The value of a name of a package, for its `__getattr__`; the value is kept there.

    Raises:
        AttributeError: the package has no such name.
    """
    if name not in homes:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    value = getattr(import_module(homes[name]), name)
    setattr(sys.modules[package], name, value)
    return value
