"""`ssmc distill`."""

from __future__ import annotations

import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ssmc.cli.checks import check_compressed
from ssmc.cli.options import Device, Force, Quiet, Resume, Verbose, tokenizer_option
from ssmc.cli.terminal import Terminal
from ssmc.cli.tracking import LOGS, LogDir, LogTo, logged
from ssmc.compressor.options.config import AUTO_STEPS
from ssmc.compressor.options.flags import CALIBRATION, METHOD, OUTPUT
from ssmc.runtime.errors import UsageError
from ssmc.runtime.ranks import is_first

if TYPE_CHECKING:
    from ssmc.compressor.distillation.steps import Distillation

TOO_MUCH = 0.2  # nats a token above the dense model: a fifth more perplexity
INTERRUPTED = "interrupted, no model was written. The same command with --resume goes on from the last steps it judged."


def distill(
    context: typer.Context,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that `ssmc compress` wrote.")] = Path(
        "ssmc-out"
    ),
    steps: Annotated[
        str,
        typer.Option(
            metavar="STEPS|auto", help=f"Gradient steps, at most; `auto` is {AUTO_STEPS}.", rich_help_panel=METHOD
        ),
    ] = "300",
    calib: Annotated[
        str | None,
        typer.Option(
            metavar="SRC",
            help="Text to distil on, as for `ssmc compress --calib`. With much text, no sequence comes twice.",
            show_default="the embedded stories",
            rich_help_panel=CALIBRATION,
        ),
    ] = None,
    seqlen: Annotated[
        int, typer.Option(min=2, help="Tokens in one sequence, at most 512.", rich_help_panel=CALIBRATION)
    ] = 512,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the draw of sequences and of their order.", rich_help_panel=CALIBRATION)
    ] = 0,
    tokenizer: Annotated[str | None, tokenizer_option("the model's own", CALIBRATION)] = None,
    device: Annotated[Device, typer.Option(help="Device to compute on.", rich_help_panel=CALIBRATION)] = "auto",
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder to write. DIR itself is replaced only with --force.",
            show_default="DIR-distilled",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    force: Force = False,
    resume: Resume = False,
    log_to: LogTo = None,
    log_dir: LogDir = LOGS,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Teach a compressed model to predict what the dense model predicts.

    All parameters that are left take gradient steps together, on text without labels; what was pruned stays pruned.
    Steps that make the model worse on held-out sequences are undone. With `torchrun --nproc-per-node N -m ssmc distill
    ...` N processes share the sequences of each step.

    **Examples**

        ssmc distill

        ssmc distill smaller --steps 1000 --calib my-text.jsonl --out smaller-1000

        ssmc distill --resume
    """
    terminal = context.ensure_object(Terminal)
    count = _count(steps)
    check_compressed(directory)
    from ssmc.compressor.distillation.run import Lesson, distil_artefact

    terminal.hush_libraries()
    terminal.interrupted = INTERRUPTED
    options = {"directory": str(directory), "steps": count, "calib": calib, "seqlen": seqlen, "seed": seed}
    name = Path(f"{directory}-distilled") if out is None else out
    terminal.quiet = terminal.quiet or not is_first()
    with logged(terminal, log_to if is_first() else None, log_dir, "distill", name, options) as tracking:
        with terminal.progress() as progress:
            result = distil_artefact(
                directory,
                Lesson(count, calib, seqlen, seed, tokenizer, device),
                out=out,
                force=force,
                resume=resume,
                command=shlex.join(["ssmc", *sys.argv[1:]]),
                progress=tracking.watch(progress),
            )
        tracking.log(vars(result.distillation))
    terminal.say(achieved(result.distillation))
    terminal.say(f"Wrote {result.directory}: the masked model, in its original shape.")
    terminal.say(f"Next: ssmc export {shlex.quote(str(result.directory))} --format safetensors")
    tell_if_too_much(terminal, result.distillation.excess, distilled=True)


def _count(steps: str) -> int:
    """Of gradient steps.

    Raises:
        UsageError: `steps` is neither a number nor auto.
    """
    if steps == "auto":
        return AUTO_STEPS
    if not steps.isdecimal() or int(steps) < 1:
        raise UsageError(f"--steps {steps!r} does not work: it should be a whole number of at least 1, or auto.")
    return int(steps)


def achieved(done: Distillation) -> str:
    """What distilling achieved, in a sentence or two."""
    if done.best_step == 0:
        return (
            f"Distilled for {done.steps} steps, none of which made the model better on held-out sequences: it is as it "
            "was. More text, given with --calib, may help."
        )
    return (
        f"Distilled for {done.steps} steps of {done.tokens} tokens: the divergence from the dense model's predictions "
        f"fell from {done.divergence_before:.4f} to {done.divergence:.4f} nats a token on held-out sequences, the loss "
        f"above the dense model's from {done.excess_before:+.4f} to {done.excess:+.4f}"
        + ("." if done.excess_far is None else f"; on tokens seen more than 100 back (recall) {done.excess_far:+.4f}.")
    )


def tell_if_too_much(terminal: Terminal, lost: float, distilled: bool) -> None:
    """Say of a result that few would use that it is one, and what would help.

    Args:
        terminal: where to.
        lost: nats a token above the dense model.
        distilled: whether it took steps already.
    """
    if lost <= TOO_MUCH:
        return
    teach = "distil it for longer on more text (ssmc distill)" if distilled else "distil it (--distill auto)"
    terminal.note(
        f"This model is much worse than the dense one: {lost:+.2f} nats a token, {math.exp(lost):.2f} times its "
        f"perplexity. Few would use it. Ask for less, or {teach}."
    )
