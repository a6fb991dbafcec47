"""The whole of `ssmc export`: read, cut, write, read back and compare, publish. What differs is in the format."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ssmc.exporters.format import Format, Job, Proof, Table
from ssmc.exporters.limit import keep_to
from ssmc.exporters.registry import format_named, refuse_missing, require_packages, settings_of
from ssmc.exporters.runtimes import Runtime
from ssmc.exporters.source import find_manifest, read_source, read_tokens
from ssmc.exporters.verify import Comparison
from ssmc.runtime.amounts import parse_bytes
from ssmc.runtime.errors import UsageError
from ssmc.runtime.files import new_directory, refuse_existing, require_space, resolve
from ssmc.runtime.locks import remove_leftovers
from ssmc.runtime.manifest import (
    MANIFEST,
    CutRecord,
    ExportManifest,
    MaskedManifest,
    file_records,
    read_manifest,
    write_manifest,
)
from ssmc.runtime.models.checkpoints import parameter_count, tensor_bytes
from ssmc.runtime.models.companions import copy_companions
from ssmc.runtime.models.consumers import (
    Consumer,
    computes_otherwise,
    consumer_named,
    misfit,
    refuse_family,
)
from ssmc.runtime.models.families import Cut
from ssmc.runtime.progress import NO_PROGRESS, Progress
from ssmc.runtime.versions import versions

DEFAULT = "safetensors"
CODE_FORMATS = "--format compressed-tensors, --format onnx --quantize codes and --format gguf --quantize codes"
STEPS = 4


@dataclass(frozen=True)
class ExportResult:
    """What `export` did.

    Attributes:
        directory: where the export is.
        format: its format.
        dense: whether the model was not compressed.
        cuts: what got smaller.
        comparison: with the model it was made from.
        runs_where: which software takes it.
        parameters: before and after.
        weight_bytes: of all tensors, before and as written.
        remarks: sentences for people.
        tables: for people.
        details: what the format found out, in a class of its own; None where there is no more to say.
    """

    directory: Path
    format: str
    dense: bool
    cuts: tuple[Cut, ...]
    comparison: Comparison
    runs_where: tuple[Runtime, ...]
    parameters: tuple[int, int]
    weight_bytes: tuple[int, int]
    remarks: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    details: Any = None


def export(
    directory: str | Path = "ssmc-out",
    *,
    format: str | None = None,
    runtime: str | None = None,
    out: str | Path | None = None,
    force: bool = False,
    max_memory: str | int | None = None,
    progress: Progress = NO_PROGRESS,
    **options: Any,
) -> ExportResult:
    """Write a compressed model in a format others load, physically smaller.

    Nothing appears unless the written files, read back, give the masked model's logits.

    Args:
        directory: what `compress` wrote. Some formats take dense models as well: a folder, a hub id, or "tiny".
        format: name of a registered format: "safetensors" (transformers' layout), "mamba-ssm" (its own), "sparse24"
            (transformers' layout in half precision with a list of the modules that are 2:4), or "onnx" (a graph with
            explicit states), "gguf" (for llama.cpp). By default the one the runtime reads, or "safetensors".
        runtime: what the export is for, see `ssmc.runtime.models.consumers`: chooses format and options, refuses models
            that it does not run. By default the one a model was compressed for.
        out: folder to write; by default one named after the format inside `directory`; NAME-FORMAT for a dense model.
        force: replace an earlier export.
        max_memory: what this process may have resident, "8GiB" or bytes; an export that needs more is refused before it
            starts. llama.cpp, which proves a GGUF file, is a process of its own.
        progress: told what is being done.
        options: of the format, see its `Options`.

    Raises:
        SsmcError: with one sentence on what is wrong and what to do.
    """
    limit = None if max_memory is None else parse_bytes(max_memory, "--max-memory")
    options = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    if runtime is None and format is None:
        runtime = _compressed_for(directory)
    consumer = None if runtime is None else consumer_named(runtime)
    format, options = _chosen(format, consumer, options)
    chosen = format_named(format)
    settings = settings_of(chosen, options)
    require_packages(chosen)
    manifest = find_manifest(directory, dense=chosen.takes_dense)
    out = _place(directory, chosen.folder(settings), manifest) if out is None else Path(out).expanduser()
    refuse_existing(out, force=force, marker=MANIFEST)  # before minutes of work, not after
    progress("reading the model", 0, STEPS)
    source = read_source(directory, manifest)
    if consumer is not None:
        refuse_family(consumer.name, source.checkpoint.architecture)
    refuse_missing(chosen, source.checkpoint.architecture)
    tokens = read_tokens(source, getattr(settings, "text", None))
    keep_to(limit, source.checkpoint, chosen)  # now: what a tokenizer takes is counted as it is
    if chosen.whole_model:
        source.checkpoint.read()
    progress("cutting", 1, STEPS)
    job = chosen.prepare(Job(source, source.shrunk(chosen.uneven), settings, tokens, progress))
    if consumer is not None:
        _refuse_misfit(consumer, job)
    before = source.checkpoint.tensors()
    require_space(out, chosen.space(job))
    leftovers = remove_leftovers(resolve(out))
    with new_directory(out, force=force, marker=MANIFEST) as folder:
        progress("writing", 2, STEPS)
        files = chosen.write(job, folder)
        files += copy_companions(source.checkpoint.directory, source.tokenizer, folder)
        progress("comparing with the model", 3, STEPS)
        proof = chosen.verify(job, folder)
        weight_bytes = chosen.weight_bytes(job, folder)
        write_manifest(folder, _manifest(chosen, job, proof, file_records(files, folder)))
    progress("done", STEPS, STEPS)
    return ExportResult(
        directory=out,
        format=chosen.name,
        dense=manifest is None,
        cuts=tuple(job.shrunk.cuts),
        comparison=proof.comparison,
        runs_where=tuple(chosen.runs_where(job)),
        parameters=(parameter_count(before), parameter_count(job.shrunk.tensors)),
        weight_bytes=(tensor_bytes(before), weight_bytes),
        remarks=(*leftovers, *_kept(chosen, job, proof), *proof.remarks, *_gains(consumer, job)),
        tables=proof.tables,
        details=proof.details,
    )


def _compressed_for(directory: str | Path) -> str | None:
    """The runtime that a model was compressed for, where that was said."""
    folder = Path(directory).expanduser()
    manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else None
    return manifest.config.get("runtime") if isinstance(manifest, MaskedManifest) else None


def _chosen(format: str | None, consumer: Consumer | None, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The format and its options; those a consumer needs, where the user named one and nothing that contradicts."""
    if consumer is None:
        return format or DEFAULT, options
    if format not in (None, consumer.format):
        raise UsageError(f"{consumer.name} reads {consumer.format}, not {format}. Leave out --format or --for.")
    for name, value in consumer.options.items():
        if options.get(name) not in (None, value):
            raise UsageError(f"{consumer.name} needs --{name} {value}, not {options[name]}. Leave it out.")
    return consumer.format, options | dict(consumer.options)


def _refuse_misfit(consumer: Consumer, job: Job) -> None:
    """Refuse a model that a consumer does not run."""
    sizes = job.source.checkpoint.architecture.dimensions(job.shrunk.config)
    epsilon = getattr(job.shrunk.config, "layer_norm_epsilon", None)
    wrong = computes_otherwise(consumer.name, job.source.checkpoint.architecture, job.shrunk.config, wrong=True)
    if reason := wrong or misfit(consumer.name, sizes, epsilon):
        raise UsageError(
            f"{consumer.name} does not run this model: {reason}. Compress with --for {consumer.name}, or export "
            "without."
        )


def _kept(chosen: Format, job: Job, proof: Proof) -> tuple[str, ...]:
    """Why an export of a compressed model is no smaller, where it is not."""
    manifest = job.source.manifest
    if manifest is None or chosen.holds_codes(job):
        return ()
    if manifest.quantized is not None:
        return (
            f"--format {chosen.name} writes the values of the {manifest.config['quantize']} codes as ordinary numbers. "
            f"The codes themselves are in {CODE_FORMATS}.",
        )
    if job.shrunk.cuts or proof.tables:  # a table of the format says what is special
        return ()
    return ("Nothing got smaller: this pattern sets numbers to zero and keeps every shape.",)


def _gains(consumer: Consumer | None, job: Job) -> tuple[str, ...]:
    """What will be faster, where it is said what the export is for."""
    if consumer is None:
        return ()
    rule = consumer.rule(job.source.checkpoint.architecture.dimensions(job.shrunk.config))
    said = computes_otherwise(consumer.name, job.source.checkpoint.architecture, job.shrunk.config, wrong=False)
    warned = (f"{consumer.name} silently computes something else than the model: {said}.",) if said else ()
    return warned + ((f"In {consumer.name}, {rule.gain}.",) if rule.gain else ())


def _place(directory: str | Path, name: str, manifest: MaskedManifest | None) -> Path:
    """Where an export goes by default: into the artefact, or beside a dense model's name in the current folder."""
    return Path(f"{Path(directory).name}-{name}") if manifest is None else Path(directory).expanduser() / name


def _manifest(format: Format, job: Job, proof: Proof, files: dict[str, dict[str, Any]]) -> ExportManifest:
    source, shrunk, compared = job.source, job.shrunk, proof.comparison
    return ExportManifest(
        source=source.origin,
        format=format.name,
        versions=versions(),
        compressed_with=None if source.manifest is None else source.manifest.versions,
        config=None if source.manifest is None else source.manifest.config,
        dimensions=source.checkpoint.architecture.dimensions(shrunk.config).as_dict(),
        cuts=tuple(CutRecord(cut.name, tuple(cut.before), tuple(cut.after)) for cut in shrunk.cuts),
        comparison={
            "max_difference": compared.max_difference,
            "tolerance": compared.tolerance,
            "largest_logit": compared.scale,
            "tokens": compared.tokens,
            "real_text": compared.real_text,
            "epsilon_difference": compared.epsilon_difference,
        }
        | ({"ways": [asdict(way) for way in proof.ways]} if proof.ways else {}),
        parameters=parameter_count(shrunk.tensors),
        files=files,
        about=proof.about,
    )
