"""`ssmc compress`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import CALIBRATION, METHOD, OUTPUT, Device, Force, Pattern, Quiet, Score, Verbose, complete_model
from .terminal import Terminal, size, table

if TYPE_CHECKING:
    from ssmc.compressor import CompressResult

MODEL_HELP = "A transformers or mamba_ssm folder, a hub id (state-spaces/mamba-130m), or `tiny`, the embedded model."


def compress(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, autocompletion=complete_model)],
    pattern: Annotated[
        Pattern, typer.Option(help="What is removed: `column`, whole states.", rich_help_panel=METHOD)
    ] = "column",
    sparsity: Annotated[
        float, typer.Option(help="The part that is removed, between 0 and 1.", rich_help_panel=METHOD)
    ] = 0.5,
    score: Annotated[
        Score, typer.Option(metavar="SCORE", help="How the importance of a state is judged.", rich_help_panel=METHOD)
    ] = "exact",
    repair: Annotated[
        bool,
        typer.Option(
            "--repair/--no-repair",
            help="Let the states that stay make up for those that go (least squares, folded into x_proj).",
            rich_help_panel=METHOD,
        ),
    ] = True,
    round_to: Annotated[
        str,
        typer.Option(
            metavar="INT|power-of-two",
            help="Keep a multiple of this many states, or a power of two: some runtimes gain only then.",
            rich_help_panel=METHOD,
        ),
    ] = "1",
    calib: Annotated[
        str | None,
        typer.Option(
            metavar="SRC",
            help="Calibration text: a .txt, .jsonl or .parquet file, a folder of them, `wikitext2`, `c4`, `ptb` or a "
            "data set of the hub.",
            show_default="the embedded stories",
            rich_help_panel=CALIBRATION,
        ),
    ] = None,
    nsamples: Annotated[int, typer.Option(help="Calibration samples.", rich_help_panel=CALIBRATION)] = 64,
    seqlen: Annotated[int, typer.Option(help="Tokens in a sample.", rich_help_panel=CALIBRATION)] = 2048,
    seed: Annotated[
        int,
        typer.Option(help="Draws the samples; the same seed gives the same bytes.", rich_help_panel=CALIBRATION),
    ] = 0,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="SRC",
            help="Folder or hub id of the tokenizer.",
            show_default="the one beside the model",
            rich_help_panel=CALIBRATION,
        ),
    ] = None,
    device: Annotated[Device, typer.Option(help="Where to compute.", rich_help_panel=CALIBRATION)] = "auto",
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write.", rich_help_panel=OUTPUT)] = Path(
        "ssmc-out"
    ),
    force: Force = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Prune a Mamba model in one shot, and write it masked, in its original shape.

    Nothing is trained: one pass over a little text decides which states go, and what the others must become to make up
    for them. `ssmc export` then makes the result physically smaller.

    **Scores**: `exact` (the default) removes the states whose loss the repair mends best; `energy` and `ghost` weigh
    states by what is read from them; `sparsessm`, `sparsessm-l2` and `sparsessm-vote` are SparseSSM's; `magnitude` and
    `random` look at no text.

    **Examples**

        ssmc compress tiny --sparsity 0.5

        ssmc compress ./my-mamba --sparsity 0.75 --calib my-text.jsonl --out smaller

        ssmc compress state-spaces/mamba-130m --calib wikitext2 --round-to power-of-two
    """
    terminal = context.ensure_object(Terminal)
    from ssmc.compressor import compress as run

    terminal.hush_libraries()
    terminal.say(
        f"Removing {sparsity:.4g} of the states of {model}: score {score}, {'with' if repair else 'without'} repair."
    )
    with terminal.progress() as progress:
        result = run(
            model,
            pattern=pattern,
            sparsity=sparsity,
            score=score,
            repair=repair,
            round_to=round_to,
            calib=calib,
            nsamples=nsamples,
            seqlen=seqlen,
            seed=seed,
            tokenizer=tokenizer,
            device=device,
            out=out,
            force=force,
            progress=progress,
            command=shlex.join(["ssmc", *sys.argv[1:]]),
        )
    _report(terminal, result)


def _report(terminal: Terminal, result: CompressResult) -> None:
    manifest = result.manifest
    calibration = manifest["calibration"]
    if calibration:
        terminal.say(f"Calibrated on {calibration['nsamples']} samples of {calibration['seqlen']} tokens.")
    dense = manifest["dimensions"]["d_state"]
    layers = table("Layers", "layer", f"kept of {dense}", "states that stay", "error", "without repair")
    for index, layer in enumerate(result.layers):
        layers.add_row(
            str(index),
            str(len(layer.kept)),
            _ranges(layer.kept),
            _error(layer.error),
            _error(layer.error_unrepaired) if layer.repaired else "",
        )
    terminal.show(layers)
    terminal.say("error: squared difference of the layer's gated output, relative to the output.", style="dim")
    for note in result.notes:
        terminal.note(note)
    written = sum(file["bytes"] for file in manifest["files"].values())
    terminal.say(f"Wrote {result.directory} ({size(written)}): the masked model, in its original shape.")
    where = "" if str(result.directory) == "ssmc-out" else f" {shlex.quote(str(result.directory))}"
    terminal.say(f"Next: ssmc export{where} --format safetensors")


def _error(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2e}"


def _ranges(numbers: tuple[int, ...]) -> str:
    """Sorted numbers, runs abbreviated: "0-3 5 8-15"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return " ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
