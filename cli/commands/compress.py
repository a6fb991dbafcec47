"""`ssmc compress`."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssmc.cli.checks import check_models
from ssmc.cli.commands.distill import INTERRUPTED, achieved, tell_if_too_much
from ssmc.cli.declared import with_options
from ssmc.cli.memory import show_written
from ssmc.cli.options import Force, MaxMemory, Quiet, Revision, Verbose, complete_model
from ssmc.cli.terminal import Terminal, size, table
from ssmc.cli.tracking import LOGS, LogDir, LogTo, logged
from ssmc.cli.tracking import NAMES as LOG_OPTIONS
from ssmc.compressor.methods.registry import load_entry_points
from ssmc.compressor.options.config import CompressConfig, configure
from ssmc.compressor.options.flags import METHOD, OUTPUT
from ssmc.compressor.options.goal import Goal, split_goal
from ssmc.compressor.options.patterns import (
    CHANNEL,
    COLUMN,
    EXPERT,
    LAYER,
    MLP,
    NOTHING,
    UNSTRUCTURED,
    WEIGHTS,
    WIDTH,
    combinable,
    described_scores,
    pattern_of,
)
from ssmc.compressor.options.recipe import read_recipe
from ssmc.runtime.amounts import parse_bytes
from ssmc.runtime.files import refuse_existing
from ssmc.runtime.manifest import MANIFEST
from ssmc.runtime.models.checkpoints.sources import at_revision
from ssmc.runtime.models.memory import LENGTH, format_bytes
from ssmc.runtime.ranks import is_first

if TYPE_CHECKING:
    from rich.table import Table

    from ssmc.compressor import CompressResult
    from ssmc.compressor.methods.method import Table as Rows

PROBLEMS = load_entry_points()  # before the help texts are made, which name what is registered
MODEL_HELP = (
    "A transformers or mamba_ssm folder, a hub id (state-spaces/mamba-130m, also with @ and a revision), or `tiny`, "
    "the embedded model."
)


@with_options(CompressConfig, Goal, after="recipe")
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
            help="Options from a YAML file, such as the recipe.yaml every run writes. Options of the command line come "
            "first.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write.", rich_help_panel=OUTPUT)] = Path(
        "ssmc-out"
    ),
    force: Force = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on where an earlier run with the same options and --out was cut off, however that happened; the "
            "result is the same, byte for byte. Without it, what such a run left is removed, but for the state of a "
            "distillation.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    max_memory: MaxMemory = None,
    log_to: LogTo = None,
    log_dir: LogDir = LOGS,
    revision: Revision = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
    **options: Any,
) -> None:
    """Prune a Mamba model in one shot, and write it masked, in its original shape.

    Nothing is trained: one pass over a little text decides what is removed, and how the rest makes up for it.
    `ssmc export` then makes the result physically smaller, where the pattern allows it.

    {scores}

    **Examples**

        ssmc compress tiny --sparsity 0.5

        ssmc compress ./my-mamba --sparsity 0.75 --calib my-text.jsonl --out smaller

        ssmc compress state-spaces/mamba-130m --calib wikitext2 --round-to power-of-two

        ssmc compress tiny --pattern unstructured --scope all --sparsity 0.5

        ssmc compress tiny --pattern column+channel --sparsity column=0.75,channel=0.25

        ssmc compress tiny --target-latency 0.6 --phase decode

        ssmc compress tiny-mamba2 --target-memory 64MiB --batch 400 --length 4096

        ssmc compress tiny --quantize w4

        ssmc compress tiny --sparsity 0.75 --quantize w4 --group-size 32

        ssmc compress tiny --recipe recipe.yaml
    """
    terminal = context.ensure_object(Terminal)
    asked = {} if recipe is None else read_recipe(recipe)
    asked.update(_given(context))
    if revision is not None:
        asked["model"] = at_revision(asked.get("model", ""), revision)
    goal, ordinary = split_goal(asked)
    config = configure(**ordinary)
    if max_memory is not None:
        parse_bytes(max_memory, "--max-memory")
    check_models([config.model])
    if is_first():
        refuse_existing(out, force=force, marker=MANIFEST)
    refuse = None
    if config.runtime is not None:
        from ssmc.exporters.foresight import refuse_left, refuse_unfit

        terminal.hush_libraries()
        refuse_unfit(config.model, config.runtime, config.tokenizer)
        refuse = partial(refuse_left, config.runtime)
    from ssmc.compressor.run import compress as run  # only now: it loads torch and transformers

    terminal.hush_libraries()
    if config.distill and goal is None:
        terminal.interrupted = INTERRUPTED
    for problem in PROBLEMS:
        terminal.note(problem)
    terminal.quiet = terminal.quiet or not is_first()
    terminal.say(_intention(config) if goal is None else _aim(config, goal))
    with _kept(terminal), logged(terminal, log_to if is_first() else None, log_dir, "compress", out, asked) as tracking:
        with terminal.progress() as progress:
            result = run(
                **asked,
                out=out,
                force=force,
                resume=resume,
                max_memory=max_memory,
                progress=tracking.watch(progress),
                command=shlex.join(["ssmc", *sys.argv[1:]]),
                refuse=refuse,
            )
        tracking.layers(result.manifest["layers"])
        tracking.log({key: result.manifest.get(key) for key in ("parameters", "distilled", "goal")})
    if is_first():
        _report(terminal, result)


@contextmanager
def _kept(terminal: Terminal) -> Iterator[None]:
    """Say on Ctrl-C what stays of a long run."""
    try:
        yield
    except KeyboardInterrupt as error:
        if kept := getattr(error, "__notes__", None):
            terminal.interrupted = f"interrupted. {' '.join(kept)}"
        raise


def _scores_text() -> str:
    """The scores of every kind of thing that is removed, for the help text."""
    kinds = {COLUMN: "of states", CHANNEL: "of channels", LAYER: "of layers"}
    kinds |= {WIDTH: "of width", WEIGHTS: "of weights (`--ffn-score`)"}
    lines = []
    for kind, heading in kinds.items():
        lines.append(f"**Importance scores {heading}**, the first is the default:")
        lines += [f"* `{name}`: {help}" for name, help in described_scores(kind).items()]
    channels = described_scores(CHANNEL)
    more = [f"`{name}`: {help}" for name, help in described_scores(MLP).items() if name not in channels]
    same = [f"`{name}`" for name in described_scores(MLP) if name in channels]
    others = "Heads, their channels, neurons, those of experts and query heads"
    lines.append(f"{others} go by {', '.join(same)}, or by {'; '.join(more)}.")
    lines.append("**Importance scores of experts**, the first is the default:")
    lines += [f"* `{name}`: {help}" for name, help in described_scores(EXPERT).items()]
    entries, states = described_scores(UNSTRUCTURED), described_scores(COLUMN)
    own = [f"`{name}`: {help}" for name, help in entries.items() if name not in states]
    shared = [f"`{name}`" for name in entries if name in states]
    lines.append(f"Entries of A_log go by {', '.join(shared)} (the first is the default), or by {'; '.join(own)}.")
    return "\n\n    ".join(lines)


compress.__doc__ = (compress.__doc__ or "").replace("{scores}", _scores_text())


def _given(context: typer.Context) -> dict[str, Any]:
    """The options of the run that stand on the command line; what is left out keeps the recipe's or its default."""
    elsewhere = {"recipe", "out", "force", "resume", "max_memory", "revision", "verbose", "quiet", *LOG_OPTIONS}
    return {
        name: value
        for name, value in context.params.items()
        if name not in elsewhere and context.get_parameter_source(name).name == "COMMANDLINE"
    }


def _intention(config: CompressConfig) -> str:
    """What a run is going to do."""
    if NOTHING in config.parts:
        return _quantising(config)
    steps = f" Then up to {config.refine} gradient steps on each layer, most of the time." if config.refine else ""
    steps += f" Then up to {config.distill_steps} gradient steps on the whole model." if config.distill else ""
    steps += f" Then {_quantising(config)}" if config.quantize else ""
    return _removal(config) + steps


def _quantising(config: CompressConfig) -> str:
    """What is quantised, in a sentence."""
    embedding = config.quantize_embedding
    modules = ", ".join(config.quantized_modules) + (f", embedding and head {embedding}" if embedding else "")
    how = "" if config.symmetric else ", with zero points"
    return f"{config.quantize} by {config.quantize_method} in groups of {config.group_size}{how}: {modules}."


def _removal(config: CompressConfig) -> str:
    """What is removed, in one sentence."""
    if config.nm is None and UNSTRUCTURED not in config.parts:
        removed = [
            f"{_share(config, part)} of the {pattern_of(part).removes} (score {config.score_of(part)})"
            for part in config.parts
        ]
        alone = all(pattern_of(part).combines is None for part in config.parts)
        repair = "" if alone else f", {'with' if config.repair else 'without'} repair"
        sentence = f"Removing {', '.join(removed)} of {config.model}{repair}."
        return sentence + (f" Then {config.ffn_score} on {', '.join(config.modules)}." if config.modules else "")
    what = f"all but {config.pattern}" if config.nm else f"{config.sparsity:.4g}"
    parts = [f"A_log by {config.first_score}"] if config.prunes_a_log else []
    parts += [f"{', '.join(config.modules)} by {config.ffn_score}"] if config.modules else []
    return f"Setting {what} of the entries to zero: {'; '.join(parts)}."


def _aim(config: CompressConfig, goal: Goal) -> str:
    """What a run with a goal is going to do, in one sentence."""
    if config.parts == combinable():
        return f"Searching for what to remove from {config.model}, down to {goal}."
    *others, last = (pattern_of(part).removes for part in config.parts)
    parts = f"{', '.join(others)} and {last}" if others else last
    return f"Searching for {parts} of {config.model} to remove, down to {goal}."


def _share(config: CompressConfig, part: str) -> str:
    """How much of a part is removed, in words."""
    own = {COLUMN: config.states, CHANNEL: config.widths}.get(part)
    return f"{config.sparsity_of(part):.4g}" if own is None else "some"


def _report(terminal: Terminal, result: CompressResult) -> None:
    from ssmc.compressor.distillation.steps import Distillation

    manifest, plan = result.manifest, result.plan
    show_written(terminal, result.directory, manifest["goal"]["asked"]["length"] if "goal" in manifest else LENGTH)
    calibration = manifest["calibration"]
    if calibration:
        terminal.say(f"Calibrated on {calibration['nsamples']} samples of {calibration['seqlen']} tokens.")
    for step in plan.steps:
        for rows in step.tables(result.outcome):
            terminal.show(_table(rows))
            if rows.legend:
                terminal.say(rows.legend, style="dim")
    if "goal" in manifest:
        terminal.say(_intention(plan.config))
        if "candidates" in manifest["goal"]:
            terminal.show(_candidates(manifest["goal"]))
        terminal.show(_outcome(manifest["goal"]))
    if manifest.get("distilled"):
        terminal.say(achieved(Distillation(**manifest["distilled"])))
    for note in result.notes:
        terminal.note(note)
    written = sum(file["bytes"] for file in manifest["files"].values())
    terminal.say(f"Wrote {result.directory} ({size(written)}): the masked model, in its original shape.")
    where = "" if str(result.directory) == "ssmc-out" else f" {shlex.quote(str(result.directory))}"
    terminal.say(f"Next: ssmc export{where} {_how(plan.config)}")
    if (lost := _lost(manifest)) is not None:
        tell_if_too_much(terminal, lost, bool(manifest.get("distilled")))


def _how(config: CompressConfig) -> str:
    """What to export for."""
    if config.runtime is not None:
        return f"--for {config.runtime}"
    return "--format safetensors" if config.quantize is None else "--format compressed-tensors"


def _lost(manifest: dict[str, Any]) -> float | None:
    """Nats a token above the dense model, on text that nothing was fitted to; None where nothing was measured."""
    if manifest.get("distilled"):
        return manifest["distilled"]["excess"]
    return manifest["goal"]["outcome"]["excess_nats"] if manifest.get("goal") else None


def _table(rows: Rows) -> Table:
    """What a method shows."""
    shown = table(rows.title, *rows.columns)
    for row in rows.rows:
        shown.add_row(*row)
    shown.caption = rows.caption or None
    return shown


def _candidates(record: dict[str, Any]) -> Table:
    """What a search over a hybrid could have carried out, the one that it did marked."""
    timed = record["candidates"][0]["time"] is not None
    columns = ["", "removed", "parameters", *(["time"] if timed else []), "nats, added up", "tried"]
    rows = table("Candidates", *columns)
    for number, entry in enumerate(record["candidates"], 1):
        removed = ", ".join(f"{axis} {share:.3g}" for axis, share in entry["removed"].items())
        mark = f"{number} *" if number == record["chosen"] else str(number)
        time = [f"{entry['time']:.3f}"] if timed else []
        tried = "" if entry["excess_nats"] is None else f"{entry['excess_nats']:.4f}"
        rows.add_row(mark, removed, f"{entry['parameters']:.3f}", *time, f"{entry['added_up_nats']:.4f}", tried)
    rows.caption = "*: carried out; --candidate K carries out another"
    return rows


def _outcome(record: dict[str, Any]) -> Table:
    """What was asked for, what was expected, and what came out."""
    asked, expected, outcome = record["asked"], record["expected"], record["outcome"]
    rows = table("Goal; parameters and time as shares of the dense model", "", "asked for", "expected", "came out")
    rows.add_row(
        "parameters", _number(asked["target_params"]), *(f"{r['parameters']:.3f}" for r in (expected, outcome))
    )
    if asked.get("target_memory") is not None:
        wanted, *memory = (format_bytes(n) for n in (asked["target_memory"], expected["memory"], outcome["memory"]))
        rows.add_row(f"memory, {asked['batch']:,} x {asked['length']:,} tokens", wanted, *memory)
    if "time" in outcome:
        what = "a step of decoding" if asked["phase"] == "decode" else f"prefill, {asked['length']} tokens"
        spread = f"{outcome['time']:.3f} ({outcome['time_low']:.3f} to {outcome['time_high']:.3f})"
        rows.add_row(f"time of {what}", _number(asked["target_latency"]), f"{expected['time']:.3f}", spread)
    increase = "" if asked["max_ppl_increase"] is None else f"at most {asked['max_ppl_increase']:+.2%}"
    stderr = "" if outcome["excess_stderr"] is None else f" ± {outcome['excess_stderr']:.4f}"
    came = f"{outcome['ppl_increase']:+.2%} ({outcome['excess_nats']:+.4f}{stderr} nats)"
    rows.add_row("perplexity", increase, f"{math.expm1(expected['excess_nats']):+.2%}", came)
    if outcome["far_nats"] is not None:
        stderr = "" if outcome["far_stderr"] is None else f" ± {outcome['far_stderr']:.4f}"
        came = f"{outcome['far_nats']:+.4f}{stderr} nats"
        rows.add_row("loss on tokens seen more than 100 back (recall)", "", "", came)
    rows.caption = "perplexity on held-out calibration text; expected: from a run on few samples"
    return rows


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
