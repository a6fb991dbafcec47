"""`ssmc compress`."""

from __future__ import annotations

import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssmc.cli.checks import check_models
from ssmc.cli.options import (
    CALIBRATION,
    METHOD,
    OUTPUT,
    TARGET,
    Device,
    FfnScore,
    Force,
    Phase,
    Quiet,
    Verbose,
    Weighting,
    complete_model,
    complete_pattern,
    complete_score,
    tokenizer_option,
)
from ssmc.cli.terminal import Terminal, size, table
from ssmc.runtime.files import refuse_existing
from ssmc.runtime.manifest import MANIFEST

if TYPE_CHECKING:
    from rich.table import Table

    from ssmc.compressor import CompressConfig, CompressResult, Target

MODEL_HELP = "A transformers or mamba_ssm folder, a hub id (state-spaces/mamba-130m), or `tiny`, the embedded model."


def compress(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help=MODEL_HELP, autocompletion=complete_model, show_default="the recipe's"),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Options from a YAML file, such as the recipe.yaml every run writes; those given here come first.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    pattern: Annotated[
        str,
        typer.Option(
            metavar="column|channel|layer|unstructured|N:M|ssm-module",
            help="What is removed. `column`, whole states, `channel`, channels of d_inner, and `layer`, whole blocks, "
            "make a model smaller and faster and can be combined: `column+channel`. `unstructured`, single entries; "
            "`2:4`, `4:8` or any N:M, all but N of every M; `ssm-module`, the SSM of whole blocks.",
            autocompletion=complete_pattern,
            rich_help_panel=METHOD,
        ),
    ] = "column",
    target: Annotated[
        str | None,
        typer.Option(
            metavar="ssm|ffn|all|MODULE,...",
            help="Where: `ssm` (A_log), `ffn` (the projections and conv1d), `all`, or names of modules.",
            show_default="ssm; ffn for N:M",
            rich_help_panel=METHOD,
        ),
    ] = None,
    sparsity: Annotated[
        str,
        typer.Option(
            metavar="PART|PATTERN=PART,...",
            help="The part that is removed, between 0 and 1; of a combined pattern for all, or for each: "
            "`column=0.75,channel=0.5`.",
            rich_help_panel=METHOD,
        ),
    ] = "0.5",
    score: Annotated[
        str | None,
        typer.Option(
            metavar="SCORE|PATTERN=SCORE,...",
            help="How states, channels and layers are judged, see above.",
            show_default="exact for column, obs for channel, mamba-shedder for layers, ghost else",
            autocompletion=complete_score,
            rich_help_panel=METHOD,
        ),
    ] = None,
    target_params: Annotated[
        float | None,
        typer.Option(
            metavar="PART",
            help="In place of a sparsity: the part of the parameters that may be left. What is removed to get there "
            "is looked for.",
            show_default=False,
            rich_help_panel=TARGET,
        ),
    ] = None,
    target_latency: Annotated[
        float | None,
        typer.Option(
            metavar="PART",
            help="In place of a sparsity: the part of the dense model's time that may be left, on this device.",
            show_default=False,
            rich_help_panel=TARGET,
        ),
    ] = None,
    max_ppl_increase: Annotated[
        float | None,
        typer.Option(
            metavar="PART",
            help="How much the perplexity may rise, 0.05 for 5 %; alone: as fast as can be within it.",
            show_default=False,
            rich_help_panel=TARGET,
        ),
    ] = None,
    phase: Annotated[
        Phase, typer.Option(help="Whose time: reading a prompt, or writing.", rich_help_panel=TARGET)
    ] = "prefill",
    batch: Annotated[int, typer.Option(help="Sequences at once.", rich_help_panel=TARGET)] = 1,
    length: Annotated[int, typer.Option(help="Tokens of the prompt.", rich_help_panel=TARGET)] = 512,
    per_layer: Annotated[
        bool,
        typer.Option(
            "--per-layer",
            help="Let layers have sizes of their own where that loses less. Only ONNX gains by it: stock loaders fill "
            "all layers up to the widest.",
            rich_help_panel=TARGET,
        ),
    ] = False,
    latency_table: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="What parts of the model take, in place of measuring it: the ssmc.json of an earlier run with a "
            "target.",
            show_default="measured",
            rich_help_panel=TARGET,
        ),
    ] = None,
    weighting: Annotated[
        Weighting, typer.Option(help="Weight of the time steps in `--score sparsessm`.", rich_help_panel=METHOD)
    ] = "power",
    ffn_score: Annotated[
        FfnScore, typer.Option(help="How the projections and conv1d are pruned.", rich_help_panel=METHOD)
    ] = "sparsegpt",
    alpha: Annotated[
        float,
        typer.Option(
            help="How far the sparsities of in_proj and out_proj spread over the layers, by sensitivity (Eq. 7).",
            rich_help_panel=METHOD,
        ),
    ] = 0.04,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair/--no-repair",
            help="Let what stays make up for what goes (least squares, folded into x_proj and out_proj).",
            rich_help_panel=METHOD,
        ),
    ] = True,
    refine: Annotated[
        int,
        typer.Option(
            metavar="STEPS",
            help="After pruning a layer, up to this many gradient steps on it alone, towards the dense model's output "
            "there (no labels); 150 are a good number. 0: none. It takes longer than all the rest.",
            rich_help_panel=METHOD,
        ),
    ] = 0,
    round_to: Annotated[
        str,
        typer.Option(
            metavar="INT|power-of-two",
            help="Keep a multiple of this many states, or a power of two: some runtimes gain only then.",
            rich_help_panel=METHOD,
        ),
    ] = "1",
    round_channels: Annotated[
        int | None,
        typer.Option(
            metavar="INT",
            help="Keep a multiple of this many channels: hardware likes 64, or 32 or 16.",
            show_default="64, less for narrow models",
            rich_help_panel=METHOD,
        ),
    ] = None,
    states: Annotated[
        str | None,
        typer.Option(
            metavar="K,K,...",
            help="States to keep in each layer, in place of a sparsity of `column`.",
            show_default="as many in every layer",
            rich_help_panel=METHOD,
        ),
    ] = None,
    widths: Annotated[
        str | None,
        typer.Option(
            metavar="W,W,...",
            help="Channels to keep in each layer, in place of a sparsity of `channel`. Stock loaders have one width: "
            "for them narrower layers are filled up with zeros to the widest.",
            show_default="as many in every layer",
            rich_help_panel=METHOD,
        ),
    ] = None,
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
    tokenizer: Annotated[str | None, tokenizer_option("the one beside the model", CALIBRATION)] = None,
    device: Annotated[Device, typer.Option(help="Where to compute.", rich_help_panel=CALIBRATION)] = "auto",
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write.", rich_help_panel=OUTPUT)] = Path(
        "ssmc-out"
    ),
    force: Force = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Prune a Mamba model in one shot, and write it masked, in its original shape.

    Nothing is trained: one pass over a little text decides what goes, and what the rest must become to make up for it.
    `ssmc export` then makes the result physically smaller, where the pattern allows it.

    **Scores** of states: `exact` (the default) removes those whose loss the repair mends best; `energy` and `ghost`
    weigh states by what is read from them; `sparsessm`, `sparsessm-l2` and `sparsessm-vote` are SparseSSM's;
    `sparsegpt` treats A_log as SparseGPT would. Of channels: `obs` (the default) removes those that out_proj can best
    do without, `activation` those that add least to its output. Of layers: `mamba-shedder` (the default) goes by
    perplexity, `similarity` by how little a layer changes what it reads. `magnitude` and `random` look at no text.

    **Examples**

        ssmc compress tiny --sparsity 0.5

        ssmc compress ./my-mamba --sparsity 0.75 --calib my-text.jsonl --out smaller

        ssmc compress state-spaces/mamba-130m --calib wikitext2 --round-to power-of-two

        ssmc compress tiny --pattern unstructured --target all --sparsity 0.5

        ssmc compress tiny --pattern column+channel --sparsity column=0.75,channel=0.25

        ssmc compress tiny --target-latency 0.6 --phase decode

        ssmc compress tiny --recipe recipe.yaml
    """
    terminal = context.ensure_object(Terminal)
    from ssmc.compressor.options.config import configure
    from ssmc.compressor.options.goal import split_target
    from ssmc.compressor.options.recipe import read_recipe

    options = {} if recipe is None else read_recipe(recipe)
    options.update(_given(context))
    target, ordinary = split_target(options)
    config = configure(**ordinary)
    check_models([config.model])
    refuse_existing(out, force=force, marker=MANIFEST)
    from ssmc.compressor.run import compress as run  # only now: it loads torch and transformers

    terminal.hush_libraries()
    terminal.say(_intention(config) if target is None else _aim(config, target))
    with terminal.progress() as progress:
        result = run(
            **options,
            out=out,
            force=force,
            progress=progress,
            command=shlex.join(["ssmc", *sys.argv[1:]]),
        )
    _report(terminal, result, result.config)


def _given(context: typer.Context) -> dict[str, Any]:
    """The options of the run that stand on the command line; what is left out keeps the recipe's or its default."""
    elsewhere = {"recipe", "out", "force", "verbose", "quiet"}
    return {
        name: value
        for name, value in context.params.items()
        if name not in elsewhere and context.get_parameter_source(name).name == "COMMANDLINE"
    }


def _intention(config: CompressConfig) -> str:
    """What a run is going to do."""
    steps = f" Then up to {config.refine} gradient steps on each layer, most of the time." if config.refine else ""
    return _removal(config) + steps


def _removal(config: CompressConfig) -> str:
    """What goes, in one sentence."""
    names = {"column": "states", "channel": "channels", "layer": "layers", "ssm-module": "SSMs"}
    if all(part in names for part in config.parts):
        goes = [
            f"{_share(config, part)} of the {names[part]} (score {config.judge_of(part).value})"
            for part in config.parts
        ]
        repair = f", {'with' if config.repair else 'without'} repair"
        repair = "" if config.pattern == "ssm-module" else repair
        sentence = f"Removing {', '.join(goes)} of {config.model}{repair}."
        return sentence + (f" Then {config.ffn_score.value} on {', '.join(config.modules)}." if config.modules else "")
    what = "all but N of every M" if config.nm else f"{config.sparsity:.4g}"
    parts = [f"A_log by {config.judge.value}"] if "A_log" in config.targets else []
    parts += [f"{', '.join(config.modules)} by {config.ffn_score.value}"] if config.modules else []
    return f"Setting {what.replace('N of every M', config.pattern)} of the entries to zero: {'; '.join(parts)}."


def _aim(config: CompressConfig, target: Target) -> str:
    """What a run with a target is going to do, in one sentence."""
    names = {"column": "states", "channel": "channels", "layer": "layers"}
    *others, last = (names[part] for part in config.parts)
    parts = f"{', '.join(others)} and {last}" if others else last
    return f"Looking for {parts} of {config.model} to remove, down to {target}."


def _share(config: CompressConfig, part: str) -> str:
    """How much of a part goes, in words."""
    own = {"column": config.states, "channel": config.widths}.get(part)
    return f"{config.sparsity_of(part):.4g}" if own is None else "some"


def _report(terminal: Terminal, result: CompressResult, config: CompressConfig) -> None:
    manifest = result.manifest
    calibration = manifest["calibration"]
    if calibration:
        terminal.say(f"Calibrated on {calibration['nsamples']} samples of {calibration['seqlen']} tokens.")
    if "column" in config.parts and "A_log" in config.targets:
        sizes = manifest["dimensions"]
        terminal.show(_states(result, sizes["d_state"] * sizes.get("n_groups", 1)))
        terminal.say("error: squared difference of the layer's gated output, relative to the output.", style="dim")
    if config.fits_out_proj() or "channel" in config.parts:
        terminal.show(_channels(result, manifest["dimensions"]["d_inner"]))
        terminal.say(
            "error: squared difference of what the layer adds to the dense model's residual stream, relative to it.",
            style="dim",
        )
    if config.refine:
        terminal.show(_refinement(result))
        terminal.say("error on held-out samples, the difference as with out_proj; step 0: left as it was.", style="dim")
    if config.modules:
        terminal.show(_modules(result))
        terminal.say("zeros, and squared error of the module's output relative to the output.", style="dim")
    if result.removals:
        terminal.show(_removals(result))
    if "target" in manifest:
        terminal.say(_intention(config))
        terminal.show(_outcome(manifest["target"]))
    for note in result.notes:
        terminal.note(note)
    written = sum(file["bytes"] for file in manifest["files"].values())
    terminal.say(f"Wrote {result.directory} ({size(written)}): the masked model, in its original shape.")
    where = "" if str(result.directory) == "ssmc-out" else f" {shlex.quote(str(result.directory))}"
    terminal.say(f"Next: ssmc export{where} --format safetensors")


def _outcome(record: dict[str, Any]) -> Table:
    """What was asked for, what was expected, and what came out."""
    asked, expected, outcome = record["asked"], record["expected"], record["outcome"]
    rows = table("Target, as part of the dense model", "", "asked for", "expected", "came out")
    rows.add_row(
        "parameters", _number(asked["target_params"]), *(f"{r['parameters']:.3f}" for r in (expected, outcome))
    )
    if "time" in outcome:
        what = "a step of decoding" if asked["phase"] == "decode" else f"prefill, {asked['length']} tokens"
        spread = f"{outcome['time']:.3f} ({outcome['time_low']:.3f} to {outcome['time_high']:.3f})"
        rows.add_row(f"time of {what}", _number(asked["target_latency"]), f"{expected['time']:.3f}", spread)
    increase = "" if asked["max_ppl_increase"] is None else f"at most {asked['max_ppl_increase']:+.2%}"
    stderr = "" if outcome["excess_stderr"] is None else f" ± {outcome['excess_stderr']:.4f}"
    came = f"{outcome['ppl_increase']:+.2%} ({outcome['excess_nats']:+.4f}{stderr} nats)"
    rows.add_row("perplexity", increase, f"{math.expm1(expected['excess_nats']):+.2%}", came)
    rows.caption = "perplexity on held-out calibration text; expected: from a run on few samples"
    return rows


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _states(result: CompressResult, dense: int) -> Table:
    layers = table("Layers", "layer", f"kept of {dense}", "states that stay", "error", "without repair")
    for index, layer in enumerate(result.layers):
        if not layer.kept:
            layers.add_row(str(index), "", "no state-space mixer")
            continue
        layers.add_row(
            str(index),
            str(len(layer.kept)),
            _ranges(layer.kept),
            _error(layer.error),
            _error(layer.error_unrepaired) if layer.repaired else "",
        )
    return layers


def _channels(result: CompressResult, dense: int) -> Table:
    layers = table("Channels", "layer", f"kept of {dense}", "error", "before out_proj was fitted")
    gone = {removal.layer for removal in result.removals}
    for index, layer in enumerate(result.layers):
        if index in gone:
            layers.add_row(str(index), "removed")
            continue
        errors = ("not measured", "") if layer.fitted is None else map(_error, vars(layer.fitted).values())
        layers.add_row(str(index), str(dense if layer.channels is None else len(layer.channels)), *errors)
    return layers


def _refinement(result: CompressResult) -> Table:
    layers = table("Refinement", "layer", "error", "before", "best step", "steps")
    for index, layer in enumerate(result.layers):
        if layer.refined is not None:
            steps = (str(layer.refined.best_step), str(layer.refined.steps))
            layers.add_row(str(index), _error(layer.refined.error), _error(layer.refined.error_before), *steps)
    return layers


def _modules(result: CompressResult) -> Table:
    """Sparsity of every module in every layer: Eq. 7 shows in the columns of in_proj and out_proj."""
    first = next((layer.modules for layer in result.layers if layer.kept), ())
    names = [module.name for module in first if "." not in module.name]
    modules = table("Modules", "layer", *names)
    others: list[Any] = []
    for index, layer in enumerate(result.layers):
        cells = {m.name: f"{m.zeros:.1%}" + ("" if m.error is None else f" ({m.error:.1e})") for m in layer.modules}
        modules.add_row(str(index), *(cells.get(name, "") for name in names))
        others += [m for m in layer.modules if m.name not in names]
    if others:
        errors = [m.error for m in others if m.error is not None]
        modules.caption = (
            f"and {len(others)} linear maps of attention and MLP: {sum(m.zeros for m in others) / len(others):.1%}"
            + (f" (at most {max(errors):.1e})" if errors else "")
        )
    for row in first:
        if row.left_out is not None:
            modules.caption = f"{row.name} left out: {row.left_out}"
    return modules


def _removals(result: CompressResult) -> Table:
    judged = result.removals[0].influence is not None
    heading = "influence (1 - cosine of input and output)" if judged else "loss on the calibration text (nats)"
    removals = table("Removed, in this order", "step", "layer", heading)
    for step, removal in enumerate(result.removals, 1):
        value = removal.influence if judged else removal.loss
        removals.add_row(str(step), str(removal.layer), "" if value is None else f"{value:.4f}")
    return removals


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
