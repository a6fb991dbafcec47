"""`ssmc export`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ssmc.cli.checks import check_compressed
from ssmc.cli.options import (
    OUTPUT,
    CompressedDirectory,
    Dtype,
    ExportFormat,
    Force,
    Logits,
    OnnxTarget,
    Quantize,
    Quiet,
    Verbose,
)
from ssmc.cli.terminal import Terminal, size, table

if TYPE_CHECKING:
    from ssmc.exporters import ExportResult
    from ssmc.exporters.onnx import OnnxReport


def export(
    context: typer.Context,
    directory: CompressedDirectory = Path("ssmc-out"),
    format: Annotated[
        ExportFormat,
        typer.Option(
            help="`safetensors`: what transformers, vLLM and llama.cpp's converter read; `mamba-ssm`: what mamba_ssm "
            "reads; `sparse24`: a half-precision checkpoint of a model compressed with --pattern 2:4, and the list of "
            "its 2:4 modules; `onnx`: a graph with explicit states for onnxruntime.",
            rich_help_panel=OUTPUT,
        ),
    ] = "safetensors",
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder to write.",
            show_default="DIR/FORMAT",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="Of sparse24: float16 or bfloat16. Of onnx: float32, or float16 for a GPU.",
            show_default="sparse24: the model's own if it is a half one, else bfloat16; onnx: float32",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    packed: Annotated[
        bool,
        typer.Option(
            "--packed", help="Store 2:4 matrices in 9/16 of their space; only ssmc reads that.", rich_help_panel=OUTPUT
        ),
    ] = False,
    logits: Annotated[
        Logits | None,
        typer.Option(
            help="Of onnx: which tokens' logits the graph gives.", show_default="last", rich_help_panel=OUTPUT
        ),
    ] = None,
    quantize: Annotated[
        Quantize | None,
        typer.Option(
            help="Of onnx: int8 weights for in_proj, out_proj and the head, for CPUs.", rich_help_panel=OUTPUT
        ),
    ] = None,
    target: Annotated[
        OnnxTarget | None,
        typer.Option(
            help="Of onnx: `portable`: standard operators only; `ort`: onnxruntime's own too (Mamba-2 decodes faster).",
            show_default="portable",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="SRC",
            help="Of onnx: held-out text for the perplexity before and after float16 or int8, as for `ssmc compress "
            "--calib`.",
            show_default="stories that come along",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    force: Force = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
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
    check_compressed(directory, or_model=format == "onnx")
    from ssmc.exporters import export as run  # only now: it loads torch and transformers

    terminal.hush_libraries()
    with terminal.progress() as progress:
        result = run(
            directory,
            format=format,
            out=out,
            dtype=dtype,
            packed=packed,
            logits=logits,
            quantize=quantize,
            target=target,
            text=text,
            force=force,
            progress=progress,
        )
    _report(terminal, result)
    if result.onnx is not None:
        terminal.say(f'Next: ssmc generate {shlex.quote(str(result.directory))} "Once upon a time"')
        return
    where = "" if str(directory) == "ssmc-out" else f" {shlex.quote(str(directory))}"
    terminal.say(f"Next: ssmc bench{where}")


def _report(terminal: Terminal, result: ExportResult) -> None:
    _cuts(terminal, result)
    sizes = table("Sizes", "", "before", "after", "ratio")
    for name, (before, after), text in (
        ("parameters", result.parameters, "{:,}".format),
        ("weights", result.weight_bytes, size),
    ):
        sizes.add_row(name, text(before), text(after), f"{after / before:.3f}")
    terminal.show(sizes)
    _modules(terminal, result)
    runtimes = table("Runs where", "runtime", "from", "runs", "remark")
    for column in runtimes.columns:
        column.justify = "left"
    for runtime in result.runs_where:
        runtimes.add_row(runtime.name, runtime.reads, "yes" if runtime.runs else "no", runtime.remark)
    terminal.show(runtimes)
    compared = result.comparison
    kind = "real text" if compared.real_text else "random tokens (there is no tokenizer)"
    model = "masked model" if result.onnx is None else "model in torch"
    terminal.say(
        f"Largest difference of a logit to the {model}: {compared.max_difference:.2e} on {compared.tokens} tokens "
        f"of {kind} (allowed {compared.tolerance:.2e}, largest logit {compared.scale:.3g})."
    )
    if compared.epsilon_difference is not None:
        terminal.say(
            "The gated norms have fewer channels and the same epsilon, so the masked model was given the epsilon to "
            f"match; that moved a logit by at most {compared.epsilon_difference:.2e}."
        )
    if result.rounding is not None:
        terminal.say(
            f"The model compared is the masked one in half precision; rounding it moved a logit by at most "
            f"{result.rounding.max_difference:.2e} (allowed {result.rounding.tolerance:.2e})."
        )
    if result.onnx is not None and result.onnx.quality is not None:
        _quality(terminal, result.onnx)
    terminal.say(f"Wrote {result.directory}.")


def _quality(terminal: Terminal, report: OnnxReport) -> None:
    """Print what float16 or int8 changed."""
    quality = report.quality
    noise = "" if quality.excess_stderr is None else f" (± {quality.excess_stderr:.4f})"
    worst = max(way.max_difference for way in report.rounding)
    terminal.say(
        f"The graph compared is the float32 one. What was written moves a logit by at most {worst:.2e}; perplexity on "
        f"{quality.tokens} tokens of {quality.text} is {quality.ppl_after:.4g} after {quality.ppl_before:.4g}, "
        f"{quality.excess_nats:+.4f} nats a token{noise}."
    )


def _modules(terminal: Terminal, result: ExportResult) -> None:
    """Print which modules are 2:4 and what takes them, one line for all layers with the same answer."""
    if not result.modules:
        return
    kinds: dict[tuple[str, tuple[int, ...], tuple[str, ...], str | None], int] = {}
    for module in result.modules:
        kind = (module.name.rpartition(".")[2], module.shape, module.backends, module.remark)
        kinds[kind] = kinds.get(kind, 0) + 1
    rows = table("2:4 modules", "module", "layers", "out x in", "sparse tensor cores")
    rows.columns[3].justify = "left"
    for (name, shape, backends, remark), count in kinds.items():
        rows.add_row(name, str(count), _join(" x ", shape), ", ".join(backends) or f"none: {remark}")
    terminal.show(rows)


def _cuts(terminal: Terminal, result: ExportResult) -> None:
    """Print layer by layer what got smaller, as `x_proj 1536 -> 80 => 1536 -> 64`."""
    if not result.cuts and result.onnx is not None and result.onnx.source.manifest is None:
        return  # a dense model
    if not result.cuts and result.modules:
        return  # the table of sizes and that of the 2:4 modules say it
    if not result.cuts:
        terminal.note("Nothing got smaller: this pattern sets numbers to zero and keeps every shape.")
        return
    layers: dict[str, list[str]] = {}
    for cut in result.cuts:
        if not cut.after:  # a whole block went
            layers[cut.name.split(".")[2]] = ["removed"]
            continue
        layer, tensor = cut.name.split(".", 4)[2::2]  # "backbone.layers.0.mixer.x_proj.weight"
        layers.setdefault(layer, []).append(_change(tensor, cut.before, cut.after))
    cuts = table("Cuts", "layer", "what got smaller")
    cuts.columns[1].justify = "left"
    for group in _alike(layers):
        name = group[0] if len(group) == 1 else f"{group[0]}-{group[-1]}"
        cuts.add_row(name, "\n".join(layers[group[0]]))
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
