"""What happened to a layer as JSON, and back: a run that goes on must know of the layers that were finished before."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ConfigDict, TypeAdapter, with_config

from ssmc.compressor.methods.method import LayerResult, Plan, Record


def as_json(result: LayerResult) -> dict[str, Any]:
    """A result as plain JSON; numbers come back as they were, to the last bit."""
    channels = None if result.channels_kept is None else list(result.channels_kept)
    records = [[record.name, _adapter(type(record)).dump_python(record, mode="json")] for record in result.records]
    units = {kind: list(kept) for kind, kept in result.units_kept.items()}
    return {
        "states_kept": list(result.states_kept),
        "channels_kept": channels,
        "records": records,
        "units_kept": units,
    }


def from_json(content: Mapping[str, Any], plan: Plan) -> LayerResult:
    """The result that `as_json` wrote in a run with the same plan."""
    kinds = {kind.name: kind for kind in _kinds(plan)}
    records = tuple(_adapter(kinds[name]).validate_python(value) for name, value in content["records"])
    channels = content["channels_kept"]
    units = {kind: tuple(kept) for kind, kept in content["units_kept"].items()}
    return LayerResult(tuple(content["states_kept"]), None if channels is None else tuple(channels), records, units)


def _adapter(kind: type[Record]) -> TypeAdapter[Any]:
    return TypeAdapter(with_config(ConfigDict(ser_json_inf_nan="constants"))(kind))


def _kinds(plan: Plan) -> Iterator[type[Record]]:
    """All records there are; those of built-in methods stand beside their arithmetic, which is loaded when it runs."""
    for step in plan.steps:
        module = sys.modules[type(step).__module__]
        package = sys.modules.get(module.__package__ or "")
        for found in pkgutil.iter_modules(getattr(package, "__path__", ())) if module is not package else ():
            importlib.import_module(f"{module.__package__}.{found.name}")
    return _subclasses(Record)


def _subclasses(kind: type[Record]) -> Iterator[type[Record]]:
    for child in kind.__subclasses__():
        yield child
        yield from _subclasses(child)
