"""`ssmc inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssmc.cli.checks import check_models
from ssmc.cli.commands.compress import MODEL_HELP
from ssmc.cli.memory import footprints_of, show_sequences
from ssmc.cli.options import OUTPUT, Quiet, Revision, Verbose, complete_model
from ssmc.cli.terminal import Terminal, size, table
from ssmc.runtime.models.checkpoints.sources import at_revision, check_source
from ssmc.runtime.models.memory import LENGTH, Footprint, rooms

if TYPE_CHECKING:
    from ssmc.compressor.families import Prospect
    from ssmc.exporters import Runtime
    from ssmc.runtime.models.inspection import Inspection
    from ssmc.runtime.models.outline import Outline


def inspect(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, autocompletion=complete_model)],
    length: Annotated[
        int, typer.Option(min=1, help="Tokens of a sequence, for the memory that it takes.", rich_help_panel=OUTPUT)
    ] = LENGTH,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Also write this as JSON.", rich_help_panel=OUTPUT),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it exists.", rich_help_panel=OUTPUT)] = False,
    revision: Revision = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Show how many sequences fit into memory, what a model consists of, what can be pruned, and what runs it.

    Nothing is computed and no weights are read: everything follows from the sizes of the tensors.

    **Examples**

        ssmc inspect tiny

        ssmc inspect tiny-hybrid --length 32768

        ssmc inspect state-spaces/mamba2-130m --json mamba2.json
    """
    terminal = context.ensure_object(Terminal)
    model = at_revision(model, revision)
    check_models([model])
    from dataclasses import asdict

    from ssmc.compressor.families import limits, prospects
    from ssmc.exporters import missing_formats, runs_where
    from ssmc.runtime.errors import OutputError
    from ssmc.runtime.models.inspection import inspect as run

    if json_file is not None and json_file.exists() and not force:
        raise OutputError(f"{json_file} exists already. Use --force to overwrite it, or another name.")
    outline = _outline(terminal, model)
    architecture, sizes = outline.architecture, outline.dimensions
    found, able = run(outline), prospects(outline)
    changed = {"n_layer": sizes.n_layer, "d_inner": sizes.d_inner, "d_state": max(1, sizes.d_state // 2)}
    halved = architecture.dimensions(architecture.resized(outline.config, **changed))
    epsilon, otherwise = getattr(outline.config, "layer_norm_epsilon", None), architecture.otherwise(outline.config)
    runtimes = runs_where(halved, sizes.d_state, architecture.model_type, epsilon, otherwise)
    missing = missing_formats(architecture)
    lacks = {**limits(architecture), **{f"--format {name}": reason for name, reason in missing.items()}}
    footprints = footprints_of(model, outline, length)
    _report(terminal, found, able, lacks, runtimes, halved.d_state, footprints, outline.stored_dtype)
    if json_file is not None:
        record = asdict(found) | {"prunable": [asdict(p) for p in able], "runs_where": [asdict(r) for r in runtimes]}
        record["not_for_this_family"] = lacks
        record["memory"] = {name: each.to_json(rooms()) for name, each in footprints.items()}
        try:
            json_file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise OutputError(
                f"{json_file} cannot be written: {error.strerror or error}. Name another file."
            ) from error
        terminal.say(f"Wrote {json_file}.")


def _outline(terminal: Terminal, model: str) -> Outline:
    """From the headers of its files where that can be, here or on the hub; else the model is read."""
    from ssmc.runtime.models.outline import outline, read_hub_outline, read_outline

    terminal.hush_hub()
    look = read_hub_outline if check_source(model) is None else read_outline
    if (read := look(model)) is not None:  # which takes no time
        return read
    terminal.hush_libraries()
    if (read := look(model, stock=True)) is not None:
        return read
    from ssmc.runtime.models.checkpoints import load_checkpoint

    with terminal.progress() as progress:
        return outline(load_checkpoint(model, progress=progress, lazy=True))


def _report(
    terminal: Terminal,
    found: Inspection,
    able: list[Prospect],
    lacks: dict[str, str],
    runtimes: list[Runtime],
    halved: int,
    footprints: dict[str, Footprint],
    dtype: str,
) -> None:
    show_sequences(terminal, footprints, dtype)
    terminal.say(
        f"{found.source}: {found.model_type} in the layout of {found.format}, {found.parameters:,} parameters, "
        f"{size(found.weight_bytes)} of {' and '.join(found.dtypes)}."
    )
    terminal.say(", ".join(f"{name} {value}" for name, value in _sizes(found.dimensions).items()))
    for note in found.notes:
        terminal.note(note)
    parts = table("Parameters and work of each part", "part", "parameters", "share", "multiply-adds per token", "share")
    for part in found.parts:
        parts.add_row(
            part.name,
            f"{part.parameters:,}",
            f"{part.parameters / found.parameters:.1%}",
            f"{part.multiply_adds:,}",
            f"{part.multiply_adds / found.multiply_adds:.1%}",
        )
    terminal.show(parts)
    terminal.say(
        f"Recurrent state of one sequence: {size(found.ssm_state_bytes)} for the SSM and "
        f"{size(found.conv_state_bytes)} for the convolution, in float32. The time of long prompts and large batches "
        "follows the multiply-adds. The time to decode one sequence follows the bytes of the weights.",
        style="dim",
    )
    prunable = table("What can be pruned", "pattern", "what is removed", "default score", "gain at sparsity 0.5")
    for prospect in able:
        prunable.add_row(prospect.pattern, prospect.what, prospect.score, prospect.gain)
    terminal.show(prunable)
    if lacks:
        left_out = table(f"Not for {found.model_type}", "option", "reason")
        left_out.columns[1].justify = "left"
        for option, reason in lacks.items():
            left_out.add_row(option, reason)
        terminal.show(left_out)
    where = table(f"Runtimes for an export with {halved} states", "runtime", "format", "runs", "remark")
    for runtime in runtimes:
        where.add_row(runtime.name, runtime.reads, "yes" if runtime.runs else "no", runtime.remark)
    terminal.show(where)


def _sizes(dimensions: dict[str, Any]) -> dict[str, Any]:
    """The sizes as they are shown; a Mamba-2 has heads where a Mamba-1 has dt_rank."""
    if "head_dim" not in dimensions:
        return dimensions
    return {("heads" if name == "dt_rank" else name): value for name, value in dimensions.items()}
