"""Command line options made out of the fields that declare them: help text, type and default stand there, once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel

from ssmc.cli.options import complete_model, complete_pattern, complete_score
from ssmc.compressor.options.flags import Flag, flags_of
from ssmc.compressor.options.renamed import RENAMED

_COMPLETIONS = {"pattern": complete_pattern, "score": complete_score, "model": complete_model}


def with_options(*models: type[BaseModel], after: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options that pydantic models declare, in place of its `**options`.

    Args:
        models: whose fields have a `Flag`.
        after: the parameter behind which they stand in the help text.
    """

    def give(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)
        parameters: list[inspect.Parameter] = []
        for parameter in own.parameters.values():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                continue
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            if parameter.name == after:
                for model in models:
                    parameters += _parameters(model)
        command.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {}  # typer reads these too, where they would say less
        return command

    return give


def _parameters(model: type[BaseModel]) -> Iterator[inspect.Parameter]:
    names = set()
    for name, flag, annotation, default in flags_of(model):
        names.add(name)
        yield _parameter(name, _type(flag, annotation, default), _default(flag, default), _option(flag))
    for old, new in RENAMED.items():
        if new in names:
            yield _parameter(old, str | None, None, typer.Option(hidden=True, help=f"The old name of --{new}."))


def _parameter(name: str, annotation: Any, default: Any, option: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, option]
    )


def _type(flag: Flag, annotation: Any, default: Any) -> Any:
    if flag.typed is None:
        return annotation
    return flag.typed | None if default is None else flag.typed


def _default(flag: Flag, default: Any) -> Any:
    return default if flag.typed in (None, Path) or default is None else flag.typed(default)


def _option(flag: Flag) -> Any:
    shown: bool | str = True if flag.default_text is None else flag.default_text or False
    return typer.Option(
        *((flag.switch,) if flag.switch else ()),
        help=flag.text,
        metavar=flag.metavar,
        show_default=shown,
        autocompletion=_COMPLETIONS.get(flag.completes or ""),
        rich_help_panel=flag.panel,
    )
