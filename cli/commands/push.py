"""`ssmc push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ssmc.cli.checks import check_compressed
from ssmc.cli.options import OUTPUT, Quiet, Verbose
from ssmc.cli.terminal import Terminal, size, table

CARD = "Model card"


def push(
    context: typer.Context,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that `ssmc export` wrote.")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="Repository of the hub, owner/name.")],
    branch: Annotated[
        str | None,
        typer.Option(
            "--branch",
            "--revision",
            metavar="NAME",
            help="Branch to write to; it is made if it is not there.",
            show_default="main",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="A new repository is seen by you alone.", rich_help_panel=OUTPUT)
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force", "-f", help="Replace files of the same name that are there; others stay.", rich_help_panel=OUTPUT
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Show the model card and the files, and upload nothing.", rich_help_panel=OUTPUT
        ),
    ] = False,
    base_model: Annotated[
        str | None,
        typer.Option(
            metavar="REPO",
            help="Model of the hub that it was made from.",
            show_default="the manifest's",
            rich_help_panel=CARD,
        ),
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Licence, as the hub names it (apache-2.0).",
            show_default="that of the model it was made from",
            rich_help_panel=CARD,
        ),
    ] = None,
    figures: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="bench.json or eval.json with figures of the export; may be given several times.",
            show_default=False,
            rich_help_panel=CARD,
        ),
    ] = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Publish an export on the Hugging Face hub, with a model card written from its manifest.

    Everything goes up in one commit. What is in the repository already is not replaced unless you say so.

    **Examples**

        ssmc push ssmc-out/safetensors me/mamba-130m-half --dry-run

        ssmc push ssmc-out/safetensors me/mamba-130m-half --private --figures bench.json
    """
    terminal = context.ensure_object(Terminal)
    check_compressed(directory)
    from ssmc.exporters.hub import push as run

    terminal.hush_hub()
    with terminal.progress() as progress:
        pushed = run(
            directory,
            repository,
            private=private,
            branch=branch,
            base_model=base_model,
            license=license,
            figures=tuple(figures or ()),
            force=force,
            dry_run=dry_run,
            progress=progress,
        )
    if dry_run:
        terminal.say(pushed.card)
    files = table("Files", "name", "size")
    for name, nbytes in pushed.files.items():
        files.add_row(name, size(nbytes))
    terminal.show(files)
    if pushed.others:
        terminal.note(f"Still in the repository from before: {', '.join(pushed.others)}.")
    if "\nlicense:" not in pushed.card:
        terminal.note("The model card names no licence, since none was found with the model. Give one with --license.")
    where = f"{repository}{'' if branch is None else f' ({branch})'}"
    total = size(sum(pushed.files.values()))
    terminal.say(f"Would upload {total} to {where}." if dry_run else f"Uploaded {total} to {where}: {pushed.url}")
