"""Things that lie in a file each, named after what they are for, beside others that are registered from outside."""

from __future__ import annotations

import pkgutil
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """A folder of modules as a mapping from their names to one attribute of each, read when it is asked for.

    There is no list to keep: a file that is put into the folder is found.

    Args:
        package: the folder as a package, "ssmc.runtime.models.families".
        attribute: what each module of it offers; None: the module itself.
        group: of the entry points by which installed packages offer more; loading one registers it.
    """

    def __init__(self, package: str, attribute: str | None = None, group: str | None = None):
        self._package, self._attribute, self._group = package, attribute, group
        self._registered: dict[str, T] = {}

    @cached_property
    def _files(self) -> frozenset[str]:
        found = pkgutil.iter_modules(import_module(self._package).__path__)
        return frozenset(module.name for module in found if not module.name.startswith("_"))

    @cached_property
    def _offered(self) -> dict[str, EntryPoint]:
        found = entry_points(group=self._group) if self._group else ()
        return {point.name: point for point in found if point.name not in self._files}

    def names(self) -> tuple[str, ...]:
        """All names, sorted; nothing is imported for it."""
        return tuple(sorted(self._files | self._offered.keys() | self._registered.keys()))

    def register(self, name: str, thing: T) -> T:
        """Add a thing from outside the folder; one registered under that name before is replaced.

        Raises:
            ValueError: a file of the folder has that name.
        """
        if name in self._files:
            raise ValueError(f"{name!r} is there already, as a module of {self._package}")
        self._registered[name] = thing
        return thing

    def find(self, name: str | None) -> Any:
        """The thing of that name, or None. Names may come from anywhere: only what is known is imported."""
        if name in self._files:
            module = import_module(f"{self._package}.{name}")
            return module if self._attribute is None else getattr(module, self._attribute, None)
        if name in self._offered and name not in self._registered:
            self._offered[name].load()
        return None if name is None else self._registered.get(name)

    def all(self) -> tuple[T, ...]:
        """All things, sorted by name."""
        return tuple(thing for name in self.names() if (thing := self.find(name)) is not None)
