"""`ssmc export`."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Mapping
from dataclasses import Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ssmc.cli.checks import check_compressed
from ssmc.cli.memory import show_written
from ssmc.cli.options import OUTPUT, CompressedDirectory, Force, MaxMemory, Quiet, Revision, Verbose
from ssmc.cli.terminal import Terminal, size, table
from ssmc.exporters import Format, all_formats
from ssmc.runtime.amounts import parse_bytes
from ssmc.runtime.models.checkpoints.sources import at_revision
from ssmc.runtime.models.consumers import CONSUMERS

if TYPE_CHECKING:
    from rich.table import Table

    from ssmc.exporters import ExportResult
    from ssmc.exporters import Table as ReportTable

DEFAULT = "safetensors"
_FORMATS = all_formats()
ForRuntime: Any = Literal[tuple(CONSUMERS)]  # type: ignore[valid-type]
Name: Any = Literal[tuple(_FORMATS)]  # type: ignore[valid-type]


def export(
    context: typer.Context,
    directory: CompressedDirectory = Path("ssmc-out"),
    format: Annotated[
        Name | None,
        typer.Option(
            help="; ".join(f"`{format.name}`: {format.help}" for format in _FORMATS.values()) + ".",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    runtime: Annotated[
        ForRuntime | None,  # type: ignore[valid-type]
        typer.Option(
            "--for",
            help="Runtime the export is for: chooses the format, and refuses a model that it does not run.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder to write.", show_default="DIR/FORMAT", rich_help_panel=OUTPUT),
    ] = None,
    force: Force = False,
    max_memory: MaxMemory = None,
    revision: Revision = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
    **options: Any,
) -> None:
    """Make a compressed model physically smaller, in a format other software loads.

    The written files are read back and run against the masked model on real text; if their logits differ by more than
    rounding, nothing is published.

    **Examples**

        ssmc export

        ssmc export smaller --format mamba-ssm --out for-mamba-ssm

        ssmc export --format sparse24 --dtype float16

        ssmc export --format onnx --quantize int8

        ssmc export tiny --format onnx
    """
    terminal = context.ensure_object(Terminal)
    directory = Path(at_revision(str(directory), revision))
    check_compressed(directory, or_model=_format(format, runtime).takes_dense)
    if max_memory is not None:
        parse_bytes(max_memory, "--max-memory")
    from ssmc.exporters import export as run  # only now: it loads torch and transformers

    terminal.hush_libraries()
    with terminal.progress() as progress:
        how = {"out": out, "force": force, "max_memory": max_memory, "progress": progress}
        result = run(directory, format=format, runtime=runtime, **how, **options)
    _report(terminal, result)
    where = "" if str(directory) == "ssmc-out" else f" {shlex.quote(str(directory))}"
    terminal.say(f"Next: {_FORMATS[result.format].next(str(result.directory), where)}")


def _format(format: str | None, runtime: str | None) -> Format:
    """The format that is written."""
    return _FORMATS[format or (CONSUMERS[runtime].format if runtime else DEFAULT)]


def _declare_options() -> None:
    """Give the command the options of all formats; one that several have is one option."""
    found: dict[str, list[tuple[str, Field[Any]]]] = {}
    for name, format in _FORMATS.items():
        for item in fields(format.Options):
            found.setdefault(item.name, []).append((name, item))
    signature = inspect.signature(export, eval_str=True)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    added = [_parameter(name, owners) for name, owners in found.items()]
    parameters = [*own[:5], *added, *own[5:]]
    export.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    export.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}


def _parameter(name: str, owners: list[tuple[str, Field[Any]]]) -> inspect.Parameter:
    """One option of the command line from what the formats that have it say of it."""
    said = [item.metadata for _, item in owners]
    help = " ".join(f"Of {owner}: {about['help']}." for (owner, _), about in zip(owners, said, strict=True))
    choices = tuple(dict.fromkeys(choice for about in said for choice in about["choices"]))
    switch = all(item.default is False for _, item in owners)
    kind: Any = bool if switch else (Literal[choices] if choices else str) | None
    shown = [
        f"{owner}: {about['shown'] or item.default}"
        for (owner, item), about in zip(owners, said, strict=True)
        if about["shown"] or item.default
    ]
    flag = f"--{name.replace('_', '-')}"
    about = typer.Option(
        flag,
        help=help,
        metavar=None if choices or switch else "SRC",
        show_default="; ".join(shown) if shown else False,
        rich_help_panel=OUTPUT,
    )
    keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Parameter(name, keyword, default=False if switch else None, annotation=Annotated[kind, about])


_declare_options()


def _report(terminal: Terminal, result: ExportResult) -> None:
    show_written(terminal, result.directory)
    _cuts(terminal, result)
    sizes = table("Sizes", "", "before", "after", "ratio")
    for name, (before, after), text in (
        ("parameters", result.parameters, "{:,}".format),
        ("weights", result.weight_bytes, size),
    ):
        sizes.add_row(name, text(before), text(after), f"{after / before:.3f}")
    terminal.show(sizes)
    for extra in result.tables:
        terminal.show(_shown(extra))
    runtimes = table("Runs where", "runtime", "from", "runs", "remark")
    for column in runtimes.columns:
        column.justify = "left"
    for runtime in result.runs_where:
        runtimes.add_row(runtime.name, runtime.reads, "yes" if runtime.runs else "no", runtime.remark)
    terminal.show(runtimes)
    compared = result.comparison
    kind = "real text" if compared.real_text else "random tokens (there is no tokenizer)"
    model = "dense model" if result.dense else "masked model"
    terminal.say(
        f"Largest difference of a logit to the {model}: {compared.max_difference:.2e} on {compared.tokens} tokens "
        f"of {kind} (allowed {compared.tolerance:.2e}, largest logit {compared.scale:.3g})."
    )
    if compared.epsilon_difference is not None:
        terminal.say(
            "Norms take the mean over fewer numbers with the same epsilon, so the masked model was given the epsilon "
            f"to match; that moved a logit by at most {compared.epsilon_difference:.2e}."
        )
    for remark in result.remarks:
        terminal.say(remark)
    terminal.say(f"Wrote {result.directory}.")


def _shown(extra: ReportTable) -> Table:
    """A format's own table; its last column is text."""
    shown = table(extra.title, *extra.columns)
    shown.columns[-1].justify = "left"
    for row in extra.rows:
        shown.add_row(*row)
    return shown


def _cuts(terminal: Terminal, result: ExportResult) -> None:
    """Print layer by layer what got smaller, as `x_proj 1536 -> 80 => 1536 -> 64`."""
    if not result.cuts:
        return
    layers: dict[str, list[str]] = {}
    outside: list[str] = []
    for cut in result.cuts:
        if ".layers." not in cut.name:  # embedding, head, the last norm
            outside.append(_change(cut.name, cut.before, cut.after))
            continue
        if not cut.after:  # a whole block went
            layers[cut.name.split(".")[2]] = ["removed"]
            continue
        _, _, layer, *rest = cut.name.split(".", 4)  # "backbone.layers.0.mixer.x_proj.weight", or "...0.norm.weight"
        of_block = len(rest) == 1 or rest[1] in ("weight", "bias")
        tensor = ".".join(rest) if of_block else rest[1]
        layers.setdefault(layer, []).append(_change(tensor, cut.before, cut.after))
    cuts = table("Cuts", "layer", "what got smaller")
    cuts.columns[1].justify = "left"
    for group in _alike(layers):
        name = group[0] if len(group) == 1 else f"{group[0]}-{group[-1]}"
        cuts.add_row(name, "\n".join(layers[group[0]]))
    if outside:
        cuts.add_row("outside", "\n".join(outside))
    terminal.show(cuts)


def _alike(layers: Mapping[str, list[str]]) -> list[list[str]]:
    """Neighbouring layers in which the same got smaller."""
    groups: list[list[str]] = []
    for layer in sorted(layers, key=int):
        if groups and int(groups[-1][-1]) + 1 == int(layer) and layers[groups[-1][0]] == layers[layer]:
            groups[-1].append(layer)
        else:
            groups.append([layer])
    return groups


def _change(tensor: str, before: tuple[int, ...], after: tuple[int, ...]) -> str:
    name = tensor.removesuffix(".weight")
    if name == "conv1d":
        before, after = before[:1] + before[2:], after[:1] + after[2:]  # depthwise: (D, 1, K)
    if name == tensor or name == "conv1d":
        return f"{name} {_join(' x ', before)} => {_join(' x ', after)}"
    # the weight of a linear layer is stored as (out, in), read it in the direction of the data
    return f"{name} {_join(' -> ', before[::-1])} => {_join(' -> ', after[::-1])}"


def _join(separator: str, shape: tuple[int, ...]) -> str:
    return separator.join(str(size) for size in shape)
